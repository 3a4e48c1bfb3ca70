"""Kills real processes of ``rescore`` and ``dedup`` in the middle and starts them again; ranks under torchrun."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig
from clipfilter_wds.offline.rescoring.run import rescore_shards
from tests.support.embeddings import pair_embeddings, write_scored
from tests.support.outputs import bits
from tests.support.pace import FOREVER
from tests.support.processes import context

NUM_SHARDS, NUM_KILLS = 60, 4
NEG = {"method": "neg_clip_loss", "num_batches": 2, "batch_size": 500}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    rng = np.random.default_rng(0)
    embeddings = {f"{shard:05d}": pair_embeddings(rng, 100, 16) for shard in range(NUM_SHARDS)}
    return write_scored(tmp_path_factory.mktemp("scored"), embeddings)


def run(config) -> None:
    torch.set_num_threads(1)
    rescore_shards(config)


def start(config):
    process = context.Process(target=run, args=(config,))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [lambda **each: RescoreConfig(**each, **NEG), lambda **each: DedupConfig(similarity=0.8, **each)]
)
def test_a_run_that_is_killed_is_continued_to_the_same_bytes(scored, tmp_path, config):
    rescore_shards(config(scores=scored, output=tmp_path / "whole"))
    expected, rng = bits(tmp_path / "whole"), random.Random(0)
    assert len(expected) == NUM_SHARDS
    output, num_done = tmp_path / "killed", []
    for _ in range(NUM_KILLS):
        process, before = start(config(scores=scored, output=output)), len(list(output.glob("*.parquet")))
        deadline, goal = time.monotonic() + FOREVER, before + rng.randint(1, NUM_SHARDS // NUM_KILLS - 3)
        while len(list(output.glob("*.parquet"))) < goal and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.kill()
        process.join()
        num_done.append(len(list(output.glob("*.parquet"))))
    assert sorted({0, *num_done, NUM_SHARDS}) == [0, *num_done, NUM_SHARDS]  # each kill was in the middle
    assert not (output / "summary.json").exists()
    process = start(config(scores=scored, output=output))
    process.join(FOREVER)
    assert process.exitcode == 0
    assert bits(output) == expected


@pytest.mark.slow
def test_torchrun_starts_ranks_that_share_the_shards(scored, tmp_path):
    rescore_shards(RescoreConfig(scores=scored, output=tmp_path / "one", **NEG))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    options = [word for name, value in NEG.items() for word in (f"--{name}", str(value))]
    command = [*launcher, "-m", "clipfilter_wds", "rescore", str(scored), "--output", str(tmp_path / "two"), *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert bits(tmp_path / "two") == bits(tmp_path / "one")


@pytest.mark.slow
def test_dedup_under_torchrun_is_refused(scored, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command = [*launcher, "-m", "clipfilter_wds", "dedup", str(scored), "--output", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "one process" in ended.stdout + ended.stderr
