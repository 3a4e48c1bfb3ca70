"""Ctrl-C, as a terminal sends it: to every process at once. Each command is in the midst of what takes long."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.pace import FOREVER, Stopwatch
from tests.support.servers import StallingServer
from tests.support.toys import pair, write_shard

COMMAND = (sys.executable, "-m", "clipfilter_wds")
HOW_TO_RESUME = "start the same command again to resume"

#: Seconds from Ctrl-C until nothing is left of a command, on an idle machine.
LIMIT = 5.0

#: A batch of these keeps a worker busy for longer than that.
LARGE = (4000, 4000)

TRAIN = """
import sys, time
from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset

scorer = ClipScorer(sys.argv[2], device="cpu")
dataset = ClipWebDataset(sys.argv[1], preprocess=scorer.preprocess, image_transform=str, text_transform=str)
options = {"num_workers": 2, "persistent_workers": sys.argv[3] == "persistent"}
for batch in ClipFilterLoader(dataset, scorer, threshold=None, batch_size=1, score_batch_size=64, **options):
    print("training", flush=True)
    time.sleep(100)
"""


@dataclass(frozen=True)
class Stopped:
    """What became of a command."""

    exit_code: int
    err: str
    seconds: float


def stop(
    command: Sequence[object],
    is_busy: Callable[[subprocess.Popen], bool],
    send: Callable[[int], None] = lambda pid: os.killpg(pid, signal.SIGINT),
) -> Stopped:
    """Start a command, wait until it is busy, and stop it; no process of it may be left."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not is_busy(process):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        family = [one for one in psutil.process_iter() if _session(one.pid) == process.pid]
        usage = psutil.Process(process.pid).cpu_times
        with Stopwatch() as watch:
            before = sum(usage()[:2])
            send(process.pid)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # so that it can be asked for its CPU seconds
            cpu_seconds = sum(usage()[:2]) - before
            _, err = process.communicate(timeout=FOREVER)
            assert not psutil.wait_procs(family, timeout=FOREVER)[1]
            return Stopped(process.returncode, err, watch.seconds(cpu_seconds))
    finally:
        process.kill()
        process.communicate()


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def has_workers(process: subprocess.Popen, num_workers: int = 2) -> bool:
    """Whether so many workers are in the midst of decoding, which is all that takes a worker half a second of CPU."""
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children()
        return sum(worker.cpu_times().user > 0.5 for worker in workers) >= num_workers
    return False


def devices_are_busy(process: subprocess.Popen) -> bool:
    """Whether the processes of two devices have a worker each in the midst of decoding."""
    with suppress(psutil.NoSuchProcess):
        devices = [one for one in psutil.Process(process.pid).children() if one.children()]
        return len(devices) == 2 and all(any(w.cpu_times().user > 0.5 for w in one.children()) for one in devices)
    return False


def check(stopped: Stopped, exit_code: int = 130, says: str = HOW_TO_RESUME) -> None:
    print(f"stopped within {stopped.seconds:.2f} s")
    assert stopped.exit_code == exit_code
    assert says in stopped.err
    assert "Traceback" not in stopped.err
    assert stopped.seconds < LIMIT


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with a shard that is soon read, and one whose images take long to decode."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "small.tar", [pair(1)] * 130)
    write_shard(folder / "large.tar", [pair(1, size=LARGE)] * 130)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rewrite", "score"])
def test_workers_that_decode_are_not_waited_for(shards, clip_folder, tmp_path, name):
    options = ("--output", tmp_path / "out", "--model", clip_folder, "--num_workers", 2)
    check(stop([*COMMAND, name, shards / "large.tar", *options], has_workers))


@pytest.mark.parametrize(
    "send",
    [
        lambda pid: os.kill(pid, signal.SIGTERM),
        # As SLURM does it.
        pytest.param(lambda pid: os.killpg(pid, signal.SIGTERM), marks=pytest.mark.slow),
    ],
    ids=["to the command", "to all its processes"],
)
def test_sigterm_stops_like_ctrl_c_with_an_exit_code_of_its_own(shards, clip_folder, tmp_path, send):
    command = [*COMMAND, "score", shards / "large.tar", "--output", tmp_path / "out", "--model", clip_folder]
    check(stop([*command, "--num_workers", 2], has_workers, send), exit_code=143)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "exit_code"),
    [
        (lambda pid: os.killpg(pid, signal.SIGINT), 130),
        (lambda pid: os.kill(pid, signal.SIGINT), 130),
        (lambda pid: os.kill(pid, signal.SIGTERM), 143),
        (lambda pid: os.killpg(pid, signal.SIGTERM), 143),
    ],
    ids=["Ctrl-C", "SIGINT to the command", "SIGTERM to the command", "SIGTERM to all its processes"],
)
def test_the_processes_of_several_devices_end_together(shards, clip_folder, tmp_path, send, exit_code):
    for name in ("1.tar", "2.tar"):
        shutil.copyfile(shards / "large.tar", tmp_path / name)  # a link would be the same shard
    options = ("--output", tmp_path / "out", "--model", clip_folder, "--num_workers", 1, "--devices", 2)
    command = [*COMMAND, "score", tmp_path / "*.tar", *options, "--device", "cpu"]
    check(stop(command, devices_are_busy, send), exit_code)


@pytest.mark.slow
def test_workers_that_open_the_images_of_a_table_are_not_waited_for(clip_folder, tmp_path):
    (tmp_path / "image.jpg").write_bytes(pair(1, size=LARGE)["jpg"])
    rows = [json.dumps({"image": "image.jpg", "caption": "a photo"})] * 260
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    options = ("--output", tmp_path / "out.jsonl", "--model", clip_folder, "--num_workers", 2)
    stopped = stop([*COMMAND, "table", tmp_path / "in.jsonl", *options], has_workers)
    check(stopped, says="stopped. Nothing was written; start the same command again\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.jpg", "in.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["anew", "persistent"])
def test_a_training_script_does_not_wait_for_its_next_batches(shards, clip_folder, workers):
    script = [sys.executable, "-c", TRAIN, shards / "{small,large}.tar", clip_folder, workers]
    # It is in its first step by then; the one worker has read the small shard, the other is at the large one.
    stopped = stop(script, lambda run: has_workers(run, 1) and run.stdout.readline() != "")
    print(f"stopped within {stopped.seconds:.2f} s")
    assert stopped.exit_code == -signal.SIGINT
    assert stopped.err.strip().endswith("KeyboardInterrupt")
    assert stopped.err.count("Traceback") == 1  # the script's own
    assert stopped.seconds < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["threshold", "keep_fraction"])  # copied while others are scored, or afterwards
def test_a_storage_that_does_not_answer_is_not_waited_for_by_what_copies(clip_folder, tmp_path, choice):
    write_shard(tmp_path / "in" / "0.tar", [pair(number) for number in range(50)])
    out = tmp_path / "out"
    with StallingServer(tmp_path / "in", lambda: (out / "_scores" / "0.parquet").exists()) as server:
        options = ("--output", out, "--model", clip_folder, "--num_workers", 2, f"--{choice}", 0.1)
        check(stop([*COMMAND, "rewrite", f"{server.address}/0.tar", *options], lambda run: server.is_stalled))
    assert not list(out.glob("*.json"))
