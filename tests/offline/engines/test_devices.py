"""One command, a process for each device: real processes, which share the CPUs here."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from clipfilter_wds.offline.engines.board import Board
from clipfilter_wds.offline.engines.config import EngineConfig
from clipfilter_wds.offline.engines.devices import num_processes
from clipfilter_wds.offline.tally import Phase, ShardStats, Tally
from clipfilter_wds.types import DropReason, FilterStats
from tests.support.outputs import bits, check_accounting
from tests.support.pace import FOREVER
from tests.support.toys import pair, write_shard

OPTIONS = ("--batch_size", "8", "--num_workers", "1", "--embeddings", "fp16", "--device", "cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    for shard in range(5):
        write_shard(folder / f"{shard:05d}.tar", [pair(100 * shard + i) for i in range(20)])
    (folder / "00003.tar").write_bytes(b"garbage" * 1000)
    return folder


def words(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "clipfilter_wds", *map(str, arguments)]


def rewrite(shards: Path, output: Path, clip_folder: Path, *more: object) -> subprocess.CompletedProcess:
    command = words("rewrite", shards, "--output", output, "--model", clip_folder, *OPTIONS, "--threshold", 0.12, *more)
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--resize_on_device"]], ids=["plain", "resize_on_device"])
def test_two_processes_write_what_one_does_and_one_of_them_sums_up(shards, clip_folder, tmp_path, more):
    one, two = (rewrite(shards, tmp_path / num, clip_folder, "--devices", num, *more) for num in ("1", "2"))
    assert (one.returncode, two.returncode) == (1, 1), two.stderr  # a shard is none
    assert bits(tmp_path / "2") == bits(tmp_path / "1")
    summary = check_accounting(tmp_path / "2")
    assert (summary["seen"], summary["shards"], summary["scored"]) == (80, 5, 80)
    assert list(summary["failed_shards"]) == [str(shards / "00003.tar")]
    assert two.stdout.count("seen") == 1


@pytest.mark.slow
def test_what_every_process_refuses_is_said_once(shards, clip_folder, tmp_path):
    assert rewrite(shards, tmp_path, clip_folder).returncode == 1
    refused = rewrite(shards, tmp_path, clip_folder, "--devices", 2, "--threshold", "0.3")
    assert refused.returncode == 2
    assert refused.stderr.count("clipfilter-wds: ") == 1
    assert len(refused.stderr.strip().splitlines()) == 1


class TestDeaths:
    @pytest.fixture
    def run(self, clip_folder, tmp_path):
        """A run on two devices that are both scoring: its process, and those of the devices."""
        for shard in range(2):
            write_shard(tmp_path / "in" / f"{shard}.tar", [pair(1, size=(4000, 4000))] * 130)
        options = ("--output", tmp_path / "out", "--model", clip_folder, *OPTIONS, "--devices", 2)
        process = subprocess.Popen(
            words("score", tmp_path / "in", *options), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            yield process, self.wait_for_ranks(process)
        finally:
            with_group = [one.pid for one in psutil.process_iter() if session(one.pid) == process.pid]
            for pid in with_group:
                os.kill(pid, signal.SIGKILL)
            process.wait()

    def wait_for_ranks(self, process) -> list[psutil.Process]:
        while True:
            assert process.poll() is None, process.communicate()
            with suppress(psutil.NoSuchProcess):  # one that has just ended, such as a tool that a library asks
                ranks = [one for one in psutil.Process(process.pid).children() if one.children()]
                if len(ranks) == 2:
                    return ranks
            time.sleep(0.1)

    @pytest.mark.slow
    def test_a_process_that_is_killed_ends_the_run_with_an_error_that_names_it(self, run):
        process, ranks = run
        family = [*ranks, *(worker for rank in ranks for worker in rank.children(recursive=True))]
        ranks[1].kill()
        _, err = process.communicate(timeout=FOREVER)
        assert process.returncode == 1
        assert f"(rank 1 of 2, process {ranks[1].pid}) died (killed by SIGKILL" in err
        assert "start the same command again to resume" in err
        assert not psutil.wait_procs(family, timeout=FOREVER)[1]

    @pytest.mark.slow
    def test_nothing_outlives_the_command(self, run):
        process, ranks = run
        family = [*ranks, *(worker for rank in ranks for worker in rank.children(recursive=True))]
        process.kill()
        assert not psutil.wait_procs(family, timeout=FOREVER)[1]


def session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


class TestNumber:
    def test_of_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        assert [num_processes(devices, "auto") for devices in (None, 1, 8, "auto")] == [1, 1, 8, 8]
        assert [num_processes(devices, "cpu") for devices in ("auto", 3)] == [1, 3]
        with pytest.raises(ValueError, match="devices is 9, but this machine has 8 CUDA devices"):
            num_processes(9, "cuda")

    def test_without_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert [num_processes(devices, "auto") for devices in (3, "auto")] == [3, 1]

    def test_a_certain_device_is_one(self):
        with pytest.raises(ValueError, match="device is 'cuda:1', which is one device, and devices is 2; give one"):
            num_processes(2, "cuda:1")

    @pytest.mark.parametrize("devices", [0, -1])
    def test_is_at_least_one(self, devices):
        with pytest.raises(ValueError, match=f"devices is {devices}; use auto, or a number of at least 1"):
            EngineConfig(devices=devices)

    def test_is_not_for_ray(self):
        with pytest.raises(ValueError, match="with --engine ray every GPU has an actor"):
            EngineConfig(engine="ray", devices=2)


def test_ranks_of_a_launcher_have_their_devices(command, shards, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = command("score", shards, "--output", tmp_path, "--model", clip_folder, "--devices", 2)
    assert code == 2
    assert (
        "this is rank 1 of 2; start the command once, as one process, or leave out devices: every rank has one" in said
    )


def test_an_output_is_not_deleted_by_several(command, shards, clip_folder, tmp_path):
    code, said = command("score", shards, "--output", tmp_path, "--devices", 2, "--device", "cpu", "--overwrite")
    assert code == 2
    assert "overwrite is for one process; leave out devices" in said


def test_the_board_shows_the_sum_of_all_ranks():
    board, told = Board(2), []
    counts = FilterStats(seen=5, kept=3, dropped={DropReason.TORN: 2})
    first = Tally(num_shards=3, num_scored=9, failed={"a": "why"}, phase=Phase.COPYING)
    first.add(ShardStats(counts=counts, rechecked=1))
    second = Tally(num_shards=2, num_scored=4)
    second.add(ShardStats(counts=counts))
    show_first, show_second = (board.joined(rank, told.append) for rank in range(2))
    show_second(second)
    assert (told[-1].num_shards, told[-1].done, told[-1].counts) == (2, 1, counts)
    show_first(first)
    total = told[-1]
    assert (total.num_shards, total.done, total.num_scored, total.phase) == (5, 3, 13, Phase.COPYING)
    assert (total.counts, total.stats.rechecked) == (counts + counts, 1)
    second.add(ShardStats(counts=counts))
    show_second(second)
    show_first(Tally(num_shards=5, phase=Phase.WAITING))  # what a rank says of all while it waits is left out
    show_first(Tally(num_shards=1, phase=Phase.COPYING))  # and so are shards that it tries once more
    assert (told[-1].done, told[-1].phase, told[-1].num_scored) == (4, Phase.COPYING, 13)
