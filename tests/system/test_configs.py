import sys
from pathlib import Path

import pytest
import yaml

from clipfilter_wds.cli import main
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from tests.support.processes import in_fresh_process
from tests.support.restore import load_scorer
from tests.support.toys import pair, write_shard

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
INLINE = [path for path in CONFIGS if path.stem.startswith("inline_")]


def test_every_config_says_how_it_is_used():
    assert len(INLINE) >= 2
    for config in CONFIGS:
        assert config.name in config.read_text().splitlines()[0]


@pytest.mark.parametrize("config", [path for path in CONFIGS if path not in INLINE], ids=lambda path: path.stem)
def test_every_command_config_runs(config, clip_folder, tmp_path):
    write_shard(tmp_path / "in/0.tar", [pair(0)])
    command = config.read_text().split()[2]
    assert command in ("rewrite", "score")
    settings = yaml.safe_load(config.read_text())
    assert settings["shards"]
    shard = str(tmp_path / "in/0.tar")
    options = ["--output", str(tmp_path / "out"), "--model", str(clip_folder)]
    if "scores" in settings:
        process_shards(ScoreConfig(shards=shard, output=tmp_path / "scores", num_workers=0), ClipScorer(clip_folder))
        options += ["--scores", str(tmp_path / "scores")]
    with pytest.raises(SystemExit) as raised:
        main([command, "--config", str(config), shard, *options])
    assert raised.value.code == 0
    assert (tmp_path / "out/summary.json").exists()


@pytest.mark.parametrize("config", INLINE, ids=lambda path: path.stem)
def test_every_training_config_makes_a_step(config, clip_folder, tmp_path):
    write_shard(tmp_path / "train.tar", [pair(seed) for seed in range(12)])
    write_shard(tmp_path / "val.tar", [pair(seed) for seed in range(4)])
    data = {
        "train": tmp_path / "train.tar",
        "val": tmp_path / "val.tar",
        "scorer.model": clip_folder,
        "loader.threshold": 0.0,
        "loader.batch_size": 2,
        "loader.score_batch_size": 4,
        "loader.num_workers": 0,
    }
    if "scores" in yaml.safe_load(config.read_text())["data"]:
        score = ScoreConfig(shards=f"{tmp_path}/*.tar", output=tmp_path / "scores", num_workers=0)
        process_shards(score, load_scorer(clip_folder))
        data = {**data, "scores": tmp_path / "scores", "scorer.model": tmp_path / "no model"}
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "fast_dev_run": "true",
        "enable_progress_bar": "false",
        "default_root_dir": tmp_path,
    }
    options = [f"--data.{name}={value}" for name, value in data.items()]
    options += [f"--trainer.{name}={value}" for name, value in trainer.items()]
    assert in_fresh_process(_fit, ["fit", f"--config={config}", *options]) == 1


def _fit(args: list[str]) -> int:
    """Run the command that the config is for; how many steps it made."""
    sys.path.insert(0, str(ROOT / "train_examples"))
    import train_clip

    return train_clip.main(args).trainer.global_step
