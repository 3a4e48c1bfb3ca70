"""Kill real processes of real runs at random moments, and start again until the run is done.

What is on disk in the end must not depend on it: no bit of the output, no temporary file, no process that is left. The
slow tests together kill 107 processes: 35 drivers, 35 DataLoader workers, 35 Ray workers, 2 drivers of Ray.
"""

import faulthandler
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread

import psutil
import pytest
import torch

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.engines.ray import RayEngine
from clipfilter_wds.offline.run import process_shards
from tests.support.outputs import bits, check_accounting
from tests.support.pace import FOREVER
from tests.support.processes import context
from tests.support.toys import pair, write_shard

#: What runs do with the shards, in turn: an output per shard, or all scores first and then shards of equal size.
CHOICES = ({"threshold": 0.12}, {"keep_fraction": 0.5, "samples_per_shard": 7})

NUM_SHARDS = 6
NUM_KILLS, NUM_RAY_KILLS = 35, 10  # after each of the latter Ray starts a worker, which takes seconds


class Runs:
    """Runs of the same shards, each into a folder of its own, and what an undisturbed one writes there."""

    def __init__(self, folder: Path, clip_folder: Path, seed: int) -> None:
        self.folder, self.load = folder, partial(ClipScorer, str(clip_folder), device="cpu")
        self.rng = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.killed: list[psutil.Process] = []
        for shard in range(NUM_SHARDS):
            write_shard(folder / "in" / f"{shard}.tar", [pair(100 * shard + i) for i in range(40)])
        self._expected: dict[int, dict[str, str]] = {}
        for number in range(len(CHOICES)):
            began = time.monotonic()
            self.finish(self.config(f"undisturbed{number}", number))
            self.usual_seconds = time.monotonic() - began  # of the last, as the first one starts the fork server
            self._expected[number] = bits(folder / f"undisturbed{number}")

    def config(self, name: str, number: int) -> RewriteConfig:
        options = {"shards": f"{self.folder}/in/*.tar", "batch_size": 8, "num_workers": 2}
        return RewriteConfig(output=self.folder / name, **options, **CHOICES[number % len(CHOICES)])

    def start(self, config: RewriteConfig) -> BaseProcess:
        """Start a run in a process of its own."""
        process = context.Process(target=_run, args=(config, self.load))
        process.start()
        return process

    def finish(self, config: RewriteConfig) -> None:
        process = self.start(config)
        process.join()
        assert process.exitcode == 0

    def kill(self, kind: str, process: psutil.Process) -> None:
        """Kill a process, and remember those that it leaves behind."""
        try:
            self.killed += [process, *process.children(recursive=True)]
            process.kill()
        except psutil.NoSuchProcess:
            return
        self.kills[kind] += 1

    def check(self, name: str, number: int) -> None:
        """A finished run has left what an undisturbed one leaves; temporary files count as well."""
        assert bits(self.folder / name) == self._expected[number % len(CHOICES)]
        check_accounting(self.folder / name)

    def check_no_process_is_left(self) -> None:
        print(f"{dict(self.kills)} in runs of {self.usual_seconds:.1f} s")
        assert not psutil.wait_procs(self.killed, timeout=FOREVER)[1]


def _run(config: RewriteConfig, load: partial[ClipScorer]) -> None:
    faulthandler.dump_traceback_later(300)  # of a run that hangs, should there be one
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader workers, as it is by default on Linux
    process_shards(config, load())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_kills", [3, pytest.param(NUM_KILLS, marks=pytest.mark.slow)])
def test_drivers_that_are_killed(clip_folder, tmp_path, num_kills):
    runs, number = Runs(tmp_path, clip_folder, seed=1), 0
    while runs.kills["driver"] < num_kills:
        config, is_done = runs.config(f"killed{number}", number), False
        while not is_done:
            process = runs.start(config)
            process.join(runs.rng.uniform(0.2, 1.0) * runs.usual_seconds)
            with suppress(psutil.NoSuchProcess):
                if process.is_alive():
                    runs.kill("driver", psutil.Process(process.pid))
            process.join()
            is_done = process.exitcode == 0
        runs.check(f"killed{number}", number)
        number += 1
    runs.check_no_process_is_left()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_kills", [3, pytest.param(NUM_KILLS, marks=pytest.mark.slow)])
def test_workers_that_are_killed(clip_folder, tmp_path, num_kills):
    """One per run: two at one sample would be that sample's fault."""
    runs, number = Runs(tmp_path, clip_folder, seed=2), 0
    while runs.kills["worker"] < num_kills:
        process = runs.start(runs.config(f"killed{number}", number))
        process.join(runs.rng.uniform(0.3, 0.9) * runs.usual_seconds)
        while process.is_alive():
            if workers := _children(process.pid, "pt_data_worker"):
                runs.kill("worker", runs.rng.choice(workers))
                break
            time.sleep(0.01)
        process.join()
        if process.exitcode != 0:  # one that dies before it does anything ends the run
            runs.finish(runs.config(f"killed{number}", number))
        runs.check(f"killed{number}", number)
        number += 1
    runs.check_no_process_is_left()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_workers_that_are_killed(clip_folder, tmp_path):
    ray = pytest.importorskip("ray")
    runs, number = Runs(tmp_path, clip_folder, seed=3), 0
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        while runs.kills["ray worker"] < NUM_RAY_KILLS:
            config, is_done = runs.config(f"killed{number}", number), False
            while not is_done:
                with RayEngine(runs.load, use_gpus=False) as engine, killing_ray_workers(runs):
                    is_done = not process_shards(config, engine).failed  # a shard may be given up
            runs.check(f"killed{number}", number)
            number += 1
    finally:
        ray.shutdown()
    runs.check_no_process_is_left()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_drivers_that_are_killed_take_the_ray_that_they_started_with_them(clip_folder, tmp_path):
    """All but two idle agents of Ray's, that try for a minute to tell the dead cluster; a constant of Ray's."""
    pytest.importorskip("ray")
    runs, out, names = Runs(tmp_path, clip_folder, seed=4), tmp_path / "killed", set()
    options = ("--model", clip_folder, "--device", "cpu", "--batch_size", 8, "--threshold", 0.12, "--engine", "ray")
    words = (sys.executable, "-m", "clipfilter_wds", "rewrite", tmp_path / "in" / "*.tar", "--output", out, *options)
    command = [str(word) for word in words]
    for num_marks in (1, 3):
        process = subprocess.Popen(command)
        while len(list(out.glob("*_stats.json"))) < num_marks:
            assert process.poll() is None
            time.sleep(0.01)
        family = [one for one in psutil.Process(process.pid).children(recursive=True) if not _is_agent(one)]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                names.add(one.name())
        process.kill()
        process.wait()
        assert not psutil.wait_procs(family, timeout=FOREVER)[1]  # after 2 to 5 s; 24 for workers that were starting
    assert {"raylet", "gcs_server"} < names
    assert any(name.startswith("ray::Worker") for name in names)
    subprocess.run(command, check=True)
    runs.check("killed", 0)


def _is_agent(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        is_server = process.name() in ("raylet", "gcs_server")  # their arguments speak of agents
        return not is_server and "agent" in f"{process.name()} {process.cmdline()}".lower()
    return False


@contextmanager
def killing_ray_workers(runs: Runs) -> Iterator[None]:
    """Kill one at a random moment, again and again, a few times in all; in between there is time to start another."""
    stop = Event()

    def kill() -> None:
        for _ in range(NUM_SHARDS):
            if stop.wait(runs.rng.uniform(0.5, 4.0)):
                return
            if actors := _children(os.getpid(), "ray::Worker"):
                runs.kill("ray worker", runs.rng.choice(actors))

    thread = Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _children(pid: int, name: str) -> list[psutil.Process]:
    """The processes below another one whose name begins with this."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith(name):
                    found.append(process)
    return found
