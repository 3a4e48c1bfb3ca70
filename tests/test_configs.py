from pathlib import Path

import pytest
import yaml

from clipfilter_wds.cli import main
from tests.toys import pair, write_shard

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs(config, clip_folder, tmp_path):
    write_shard(tmp_path / "in/0.tar", [pair(0)])
    command = config.read_text().split()[2]
    assert command in ("rewrite", "score")
    assert yaml.safe_load(config.read_text())["shards"]
    shard = str(tmp_path / "in/0.tar")
    options = ["--output", str(tmp_path / "out"), "--model", str(clip_folder)]
    with pytest.raises(SystemExit) as raised:
        main([command, "--config", str(config), shard, *options])
    assert raised.value.code == 0
    assert (tmp_path / "out/summary.json").exists()
