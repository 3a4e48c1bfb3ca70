import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipfilter_wds.demo.shards import write_demo_shards
from tests.support.processes import in_fresh_process

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "train_examples"
SMALL = ["--batch_size", "16", "--num_workers", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder in which the examples find the demo's shards."""
    folder = tmp_path_factory.mktemp("examples")
    write_demo_shards(folder / "demo_shards")
    return folder


def run(script: str, *options: str, cwd: Path) -> str:
    """What a script prints, in a process of its own as a user would start it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, str(EXAMPLES / script), *options]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def losses(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("step ")]


@pytest.mark.slow
def test_plain_loop_resumes_as_if_it_had_never_stopped(folder, tmp_path):
    options = [*SMALL, "--shards", f"{folder}/demo_shards/{{00000..00001}}.tar"]
    whole = losses(run("plain_loop.py", *options, "--steps", "30", cwd=tmp_path))
    run("plain_loop.py", *options, "--steps", "25", cwd=tmp_path)  # within the second epoch
    resumed = losses(run("plain_loop.py", *options, "--steps", "30", "--resume", "plain_loop.pt", cwd=tmp_path))
    assert len(whole) == 3
    assert resumed == whole[2:]


@pytest.mark.slow
def test_plain_loop_draws_its_own_shards_and_learns(tmp_path):
    lines = losses(run("plain_loop.py", "--steps", "200", cwd=tmp_path))
    assert len(list((tmp_path / "demo_shards").glob("*.tar"))) == 4
    first, last = (float(line.split()[3].rstrip(",")) for line in (lines[0], lines[-1]))
    assert last < first - 1.0


@pytest.mark.slow
def test_fabric_loop_runs_on_two_ranks(folder, tmp_path):
    options = ["--accelerator", "cpu", "--devices", "2", "--shards", f"{folder}/demo_shards/{{00000..00001}}.tar"]
    output = run("fabric_loop.py", *SMALL, *options, "--steps", "10", cwd=tmp_path)
    assert [line.split()[1] for line in losses(output)] == ["10:"]  # of rank 0 only
    assert (tmp_path / "fabric_loop.ckpt").exists()


@pytest.mark.slow
def test_fabric_loop_resumes_as_if_it_had_never_stopped(folder, tmp_path):
    options = [*SMALL, "--accelerator", "cpu", "--devices", "2", "--shards", f"{folder}/demo_shards/*.tar"]
    whole = losses(run("fabric_loop.py", *options, "--steps", "40", cwd=tmp_path))
    run("fabric_loop.py", *options, "--steps", "25", cwd=tmp_path)
    resumed = losses(run("fabric_loop.py", *options, "--steps", "40", "--resume", "fabric_loop.ckpt", cwd=tmp_path))
    assert len(whole) == 4
    assert resumed == whole[2:]


@pytest.mark.slow
def test_train_clip_on_two_ranks_logs_the_filter(folder, tmp_path):
    run("train_clip.py", *lightning(folder, devices=2), "--trainer.max_steps=4", cwd=tmp_path)
    rows = metrics(tmp_path / "lightning_logs/version_0")
    assert 0.5 < float(rows[0]["clipfilter/keep_rate"]) < 0.9
    assert float(rows[0]["clipfilter/score_mean"]) >= 0.28
    assert float(rows[-1]["loss"]) > 0


@pytest.mark.slow
def test_train_clip_resumes_as_if_it_had_never_stopped(folder, tmp_path):
    options = [*lightning(folder, devices=1), "--trainer.max_steps=8"]
    saving = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=5"]
    run("train_clip.py", *options, *saving, cwd=tmp_path)
    [saved] = (tmp_path / "lightning_logs/version_0").glob("checkpoints/*step=5.ckpt")
    run("train_clip.py", *options, f"--ckpt_path={saved}", cwd=tmp_path)
    whole, resumed = (
        {row["step"]: row["loss"] for row in metrics(tmp_path / f"lightning_logs/version_{version}")}
        for version in (0, 1)
    )
    assert list(resumed) == ["5", "7"]
    assert resumed == {step: whole[step] for step in resumed}


def filtering_pays(folder: Path, **options: int) -> dict[str, Any]:
    """What the script found for each of the three ways."""
    output = run("filtering_pays.py", *(f"--{name}={value}" for name, value in options.items()), cwd=folder)
    figures = json.loads((folder / "filtering_pays/figures.json").read_bytes())
    for name in ("raw", "filtered inline", "rewritten ahead"):
        shares = [figures["runs"][name]["recalls"][-1][direction] for direction in ("image_to_text", "text_to_image")]
        [row] = [line for line in output.splitlines() if line.startswith(f"│ {name}")]
        assert all(f"{share:.1%}" in row for share in shares)
    assert "chance: 1.0%" in output
    return figures["runs"]


@pytest.mark.slow
def test_filtering_pays_trains_and_compares_three_ways(tmp_path):
    runs = filtering_pays(tmp_path, steps=2, batch_size=32, num_samples=256, galleries=1)
    raw, inline, rewritten = runs["raw"], runs["filtered inline"], runs["rewritten ahead"]
    assert 0.3 < raw["true_share"] < 0.7
    assert inline["true_share"] > 0.9
    assert rewritten["true_share"] > 0.9
    assert rewritten["samples_read"] < inline["samples_read"]
    for found in runs.values():
        assert [recall["step"] for recall in found["recalls"]] == [0, 1, 2]
    assert raw["recalls"][0] == inline["recalls"][0] == rewritten["recalls"][0]  # the same weights
    assert Image.open(tmp_path / "filtering_pays/recall.png").width > 800


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_filtering_pays_off_when_half_of_the_captions_are_false(tmp_path):
    runs = filtering_pays(tmp_path, steps=150, num_samples=4000, galleries=4)
    raw, inline, rewritten = (found["recalls"][-1]["image_to_text"] for found in runs.values())
    assert inline > 2 * raw
    assert rewritten > 2 * raw


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compare_scores_trains_on_what_each_score_chooses(tmp_path):
    output = run("compare_scores.py", "--steps=100", "--seeds=1", "--num_samples=2000", "--galleries=2", cwd=tmp_path)
    runs = json.loads((tmp_path / "compare_scores/figures.json").read_bytes())["runs"]
    cosine, neg_clip_loss, chance = (runs[name][0] for name in ("cosine", "neg_clip_loss", "chance"))
    for choice in (cosine, neg_clip_loss):
        assert choice["auc_generic"] > 0.99
        assert choice["true_share"] > 0.95
        assert choice["image_to_text"] > chance["image_to_text"]
    assert 0.4 < chance["true_share"] < 0.6
    assert f"{neg_clip_loss['true_share']:.1%}" in output


def test_help_of_train_clip_explains_every_option():
    text = in_fresh_process(_help)
    sections = re.split(r"\n  (?=--)", text[text.index("\n  --model CONFIG") :])
    sections = [" ".join(section.split()) for section in sections if section.startswith(("--model.", "--data."))]
    sections = [section for section in sections if not section.endswith("CONFIG Path to a configuration file.")]
    assert len(sections) >= 30
    assert any(section.startswith("--data.loader.worker_timeout ") for section in sections)
    # Name and placeholder, a sentence from the docstring, type and default.
    assert [section for section in sections if not re.search(r"\. \((type|required)", section)] == []


def _help() -> str:
    sys.path.insert(0, str(EXAMPLES))
    os.environ["COLUMNS"] = "200"
    import train_clip

    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        train_clip.main(["fit", "--help"])
    return output.getvalue()


def lightning(folder: Path, *, devices: int) -> list[str]:
    return f"""fit --data.train {folder}/demo_shards/{{00000..00003}}.tar --data.scorer.model demo-tiny
        --data.loader.threshold 0.28 --data.loader.batch_size 16
        --data.loader.num_workers 1 --data.loader.score_batch_size 32
        --data.image_transform small_clip.image_view --data.text_transform small_clip.text_view
        --trainer.accelerator cpu --trainer.devices {devices} --trainer.log_every_n_steps 2
        --trainer.enable_progress_bar false --trainer.logger CSVLogger --trainer.logger.save_dir .""".split()


def metrics(version: Path) -> list[dict[str, str]]:
    with (version / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
