"""Several ranks, real processes, one output."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from clipfilter_wds.cli import main
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.engines import ranks
from clipfilter_wds.offline.engines.board import Board
from clipfilter_wds.offline.engines.ranks import Ranks
from clipfilter_wds.offline.run import process_shards, process_share
from clipfilter_wds.offline.tally import Tally
from clipfilter_wds.world import World
from tests.support.outputs import bits, check_accounting
from tests.support.pace import FOREVER
from tests.support.processes import context
from tests.support.toys import pair, write_shard

OPTIONS = {"threshold": 0.12, "batch_size": 8, "num_workers": 0, "embeddings": "fp16"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("in")
    for shard in range(7):
        write_shard(folder / f"{shard:05d}.tar", [pair(100 * shard + i) for i in range(20)])
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def expected(shards, scorer, tmp_path_factory) -> dict[str, str]:
    """The bits that one process writes."""
    output = tmp_path_factory.mktemp("one") / "out"
    process_shards(RewriteConfig(shards=shards, output=output, **OPTIONS), scorer)
    return bits(output)


def run_rank(
    rank: int, world_size: int, shards: str, output: Path, clip_folder: Path, delay: float = 0.0, **options: object
) -> None:
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    time.sleep(delay)
    scorer = ClipScorer(clip_folder, device="cpu")
    config = RewriteConfig(shards=shards, output=output, **(options or OPTIONS))
    process_shards(config, scorer, world=World(rank=rank, world_size=world_size), rank_timeout=FOREVER)


def start(rank, world_size, *args, **kwargs):
    process = context.Process(target=run_rank, args=(rank, world_size, *args), kwargs=kwargs)
    process.start()
    return process


@pytest.mark.parametrize(
    "late", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["rank-zero-last", "rank-zero-waits"]
)
def test_ranks_write_what_one_process_writes_and_rank_zero_sums_up(shards, expected, clip_folder, tmp_path, late):
    output = tmp_path / "out"
    args = (shards, output, clip_folder)
    processes = [start(rank, 3, *args, delay=1.5 if rank == late else 0.0) for rank in range(3)]
    for process in processes:
        process.join(FOREVER)
        assert process.exitcode == 0
    assert bits(output) == expected
    summary = check_accounting(output)
    # What was there when rank zero began counts as resumed, whoever did it.
    assert (summary["shards"], summary["seen"], summary["scored"] + 20 * summary["resumed_shards"]) == (7, 140, 140)


@pytest.mark.slow
def test_a_rank_that_is_killed_and_started_again_loses_nothing(shards, expected, clip_folder, tmp_path):
    output, rng = tmp_path / "out", random.Random(0)
    args = (shards, output, clip_folder)
    first = start(0, 2, *args)
    for _ in range(4):
        second = start(1, 2, *args)
        second.join(rng.uniform(0.2, 1.2))
        if second.is_alive():
            os.kill(second.pid, signal.SIGKILL)
            second.join()
    second = start(1, 2, *args)
    for process in (first, second):
        process.join(FOREVER)
        assert process.exitcode == 0
    assert bits(output) == expected
    check_accounting(output)


@pytest.mark.slow
def test_ranks_cut_the_whole_runs_scores_at_a_fraction(shards, scorer, clip_folder, tmp_path):
    """Nothing can be copied before all ranks have scored; a shard that one of them can't use counts for none."""
    folder = tmp_path / "in"
    folder.mkdir()
    for path in Path(shards).parent.glob("*.tar"):
        (folder / path.name).symlink_to(path)
    (folder / "00002.tar").unlink()
    (folder / "00002.tar").write_bytes(b"garbage" * 1000)
    options = {"keep_fraction": 0.3, "batch_size": 8, "num_workers": 0}
    config = RewriteConfig(shards=f"{folder}/*.tar", output=tmp_path / "one", **options)
    process_shards(config, scorer)
    processes = [start(rank, 2, f"{folder}/*.tar", tmp_path / "out", clip_folder, **options) for rank in range(2)]
    for process in processes:
        process.join(FOREVER)
        assert process.exitcode == 0
    assert bits(tmp_path / "out") == bits(tmp_path / "one")
    summary = check_accounting(tmp_path / "out")
    assert (summary["kept"], summary["seen"], summary["shards"], summary["resumed_shards"]) == (36, 120, 7, 0)
    assert list(summary["failed_shards"]) == [str(folder / "00002.tar")]


@pytest.mark.slow
def test_runs_that_do_the_same_work_at_once_do_no_harm(shards, expected, clip_folder, tmp_path):
    output = tmp_path / "out"
    processes = [start(0, 1, shards, output, clip_folder) for _ in range(3)]
    for process in processes:
        process.join(FOREVER)
        assert process.exitcode == 0
    assert bits(output) == expected
    check_accounting(output)


@pytest.mark.parametrize("change", ["output_deleted", "shard_replaced"])
def test_what_is_lost_when_the_others_are_known_to_be_done_is_done_again(shards, scorer, tmp_path, change):
    """Nobody is left who would write the mark that rank zero waits for."""
    folder, out, board = tmp_path / "in", tmp_path / "out", Board(2)
    shutil.copytree(Path(shards).parent, folder)
    config = RewriteConfig(shards=folder, output=out, **OPTIONS)

    def run(rank: int) -> Tally:
        seen_from = Ranks(folder=out, world=World(rank=rank, world_size=2), timeout=2.0, board=board)
        return process_share(config, scorer, seen_from, lambda tally: None)

    run(1)
    if change == "output_deleted":
        for path in (out / "00003.tar", out / "00003_stats.json"):
            path.unlink()
    else:
        write_shard(folder / "00003.tar", [pair(index) for index in range(5)])
    tally = run(0)
    process_shards(RewriteConfig(shards=folder, output=tmp_path / "one", **OPTIONS), scorer)
    assert (tally.failed, tally.done) == ({}, 7)
    assert bits(out) == bits(tmp_path / "one")
    check_accounting(out)


class TestCommand:
    """The command, as torchrun and srun start it. Ranks one after the other in this process, rank zero last."""

    def call(self, monkeypatch, world: dict[str, object], *arguments: object) -> int:
        for name, value in world.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        for name in world:
            monkeypatch.delenv(name)
        return ended.value.code

    @pytest.mark.parametrize(
        ("rank_variable", "size_variable"), [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]
    )
    def test_shares_out_the_shards_with_no_further_option(
        self, monkeypatch, capsys, shards, expected, clip_folder, tmp_path, rank_variable, size_variable
    ):
        options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
        options += ["--model", clip_folder]
        done = []
        for rank in (2, 1, 0):
            world = {rank_variable: rank, size_variable: 3}
            assert self.call(monkeypatch, world, "rewrite", shards, "--output", tmp_path / "out", *options) == 0
            done.append(len(list((tmp_path / "out").glob("*_stats.json"))))
            said = capsys.readouterr()
            assert ("seen" in said.out) == (rank == 0)  # only rank zero says how it went
        assert done == [2, 4, 7]
        assert bits(tmp_path / "out") == expected
        check_accounting(tmp_path / "out")

    def test_a_failed_shard_of_any_rank_is_in_the_summary_and_only_rank_zero_exits_with_1(
        self, monkeypatch, clip_folder, tmp_path
    ):
        for shard in range(4):
            write_shard(tmp_path / "in" / f"{shard}.tar", [pair(shard)] * 3)
        (tmp_path / "in" / "1.tar").write_bytes(b"garbage" * 1000)
        options = ("--model", clip_folder, "--num_workers", 0)
        arguments = ("score", f"{tmp_path}/in/*.tar", "--output", tmp_path / "out", *options)
        # An exit code of 1 would make torchrun kill the other ranks.
        assert self.call(monkeypatch, {"RANK": 1, "WORLD_SIZE": 2}, *arguments) == 0
        assert not (tmp_path / "out" / "summary.json").exists()
        assert self.call(monkeypatch, {"RANK": 0, "WORLD_SIZE": 2}, *arguments) == 1
        summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
        assert list(summary["failed_shards"]) == [str(tmp_path / "in" / "1.tar")]
        assert (summary["seen"], summary["kept"]) == (9, 9)
        assert Counter(path.suffix for path in (tmp_path / "out").iterdir()) == {".parquet": 3, ".json": 1}

    def test_a_note_of_trouble_that_is_over_does_no_harm(self, monkeypatch, clip_folder, tmp_path):
        for shard in range(2):
            write_shard(tmp_path / "in" / f"{shard}.tar", [pair(shard)] * 3)
        good = (tmp_path / "in" / "1.tar").read_bytes()
        (tmp_path / "in" / "1.tar").write_bytes(b"garbage" * 1000)
        options = ("--model", clip_folder, "--num_workers", 0)
        arguments = ("score", f"{tmp_path}/in/*.tar", "--output", tmp_path / "out", *options)
        assert self.call(monkeypatch, {"RANK": 1, "WORLD_SIZE": 2}, *arguments) == 0
        (tmp_path / "in" / "1.tar").write_bytes(good)
        assert self.call(monkeypatch, {"RANK": 0, "WORLD_SIZE": 2}, *arguments) == 0
        assert json.loads((tmp_path / "out" / "summary.json").read_bytes())["seen"] == 6

    def test_a_rank_that_never_comes_ends_the_wait_with_what_is_missing(
        self, monkeypatch, capsys, shards, clip_folder, tmp_path
    ):
        monkeypatch.setattr(ranks, "_LOOK_SECONDS", 0.1)
        options = ("--model", clip_folder, "--num_workers", 0, "--rank_timeout", 0.5)
        arguments = ("score", shards, "--output", tmp_path / "out", *options)
        assert self.call(monkeypatch, {"RANK": 0, "WORLD_SIZE": 4}, *arguments) == 1
        said = capsys.readouterr().err
        assert "5 of 7 shards have no outcome" in said
        assert "00001.tar" in said
        assert "rank 1, 2, 3 of 4; is it running? What was finished is whole" in said
        assert "start the same command again to resume" in said
        assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.slow
def test_torchrun_starts_ranks_that_share_the_work(shards, expected, clip_folder, tmp_path):
    options = ["--threshold", "0.12", "--batch_size", "8", "--num_workers", "0", "--model", str(clip_folder)]
    options += ["--embeddings", "fp16"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command = [*launcher, "-m", "clipfilter_wds", "rewrite", shards, "--output", str(tmp_path / "out"), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert bits(tmp_path / "out") == expected
    check_accounting(tmp_path / "out")
