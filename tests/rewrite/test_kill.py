"""Kill real runs at random moments; what is on disk in the end must not depend on it."""

import multiprocessing
import multiprocessing.process
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from clipfilter_wds.rewrite import RewriteConfig, process_shards
from clipfilter_wds.scorer import ClipScorer
from tests.rewrite.test_rewrite import bits, check_accounting
from tests.toys import pair, write_shard

# Runs are forked off a process that has imported torch and never used it: that is quick, and safe for its threads.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "clipfilter_wds.rewrite",
        "clipfilter_wds.scorer",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.image_processing_clip",
        "transformers.models.clip.tokenization_clip",
    ]
)


def start(config: RewriteConfig, clip_folder: Path) -> multiprocessing.process.BaseProcess:
    """Start a run in a process group of its own."""
    process = context.Process(target=run_in_group, args=(config, clip_folder))
    process.start()
    return process


def run_in_group(config: RewriteConfig, clip_folder: Path) -> None:
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    process_shards(config, ClipScorer(clip_folder, device="cpu"))


def finish(config: RewriteConfig, clip_folder: Path) -> None:
    process = start(config, clip_folder)
    process.join()
    assert process.exitcode == 0


def kill(process: multiprocessing.process.BaseProcess) -> bool:
    """Kill the run and its workers; whether it was still running."""
    was_running = process.is_alive()
    if was_running:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not come as far as to make its group
            process.kill()
    process.join()
    return was_running


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("choice", "num_kills"),
    [
        ({"threshold": 0.12}, 3),
        pytest.param({"threshold": 0.12}, 20, marks=pytest.mark.slow),
        pytest.param({"keep_fraction": 0.5, "samples_per_shard": 7}, 8, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_undisturbed_one(
    clip_folder, tmp_path, choice, num_kills
):
    for shard in range(6):
        write_shard(tmp_path / "in" / f"{shard}.tar", [pair(100 * shard + i) for i in range(40)])
    options = {"shards": f"{tmp_path}/in/*.tar", **choice, "batch_size": 8, "num_workers": 2}
    undisturbed = RewriteConfig(output=tmp_path / "undisturbed", **options)
    finish(undisturbed, clip_folder)
    began = time.monotonic()
    finish(RewriteConfig(output=tmp_path / "timed", **options), clip_folder)  # the first one started the fork server
    usual_seconds = time.monotonic() - began
    expected = bits(tmp_path / "undisturbed")
    check_accounting(tmp_path / "undisturbed")

    rng, kills, attempt = random.Random(0), 0, 0
    while kills < num_kills:
        # A fresh output now and then, since a run that is resumed often enough has nothing left to be killed in.
        config = RewriteConfig(output=tmp_path / f"killed{attempt // 3}", **options)
        process = start(config, clip_folder)
        process.join(rng.uniform(0.1, 1.0) * usual_seconds)
        kills += kill(process)
        attempt += 1
    for output in tmp_path.glob("killed*"):
        finish(RewriteConfig(output=output, **options), clip_folder)
        assert bits(output) == expected
        check_accounting(output)
