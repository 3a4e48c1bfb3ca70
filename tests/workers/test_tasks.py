"""Tasks run in processes of their own, whose end nobody waits for longer than need be."""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import psutil
import pytest

from clipfilter_wds.types import ShardError
from clipfilter_wds.workers.tasks import TaskDiedError, TaskProcesses
from tests.support.pace import FOREVER
from tests.support.processes import in_fresh_process


def double(number: int) -> int:
    return 2 * number


def refuse(why: str) -> None:
    raise ShardError(why)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(began: Path) -> None:
    began.write_text(str(os.getpid()))
    time.sleep(10 * FOREVER)


def interrupt_what_sleeps(began: Path) -> None:
    with TaskProcesses(1) as processes:
        processes.submit(sleep, began)
        while not (began.exists() and began.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt


def test_every_task_is_done_when_the_block_ends():
    with TaskProcesses(2) as processes:
        futures = [processes.submit(double, number) for number in range(20)]
    assert [processes.result(future) for future in futures] == list(range(0, 40, 2))


def test_what_a_task_raises_is_raised_where_its_result_is_asked_for():
    with TaskProcesses(1) as processes:
        refused, done = processes.submit(refuse, "no such shard"), processes.submit(double, 1)
        with pytest.raises(ShardError, match="no such shard"):
            processes.result(refused)
        assert processes.result(done) == 2


def test_a_process_that_is_killed_is_an_error_that_says_by_what():
    with TaskProcesses(1) as processes, pytest.raises(TaskDiedError, match=r"a process that writes .* died \(SIGKILL"):
        processes.result(processes.submit(die))


def start_with_few_files() -> list[tuple[str, int]]:
    """Per number of files that may still be opened, what came of starting, and how many processes were left."""
    hard, outcomes = resource.getrlimit(resource.RLIMIT_NOFILE)[1], []
    for num_free in range(4, 24, 2):
        num_open = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + num_free, hard))
        said = ""
        try:
            with TaskProcesses(4):
                pass
        except OSError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for process in multiprocessing.active_children():
            process.join(5.0)
        outcomes.append((said, len(multiprocessing.active_children())))
    return outcomes


def test_processes_that_can_not_all_be_started_are_not_left():
    """The program's end would wait for them for ever."""
    outcomes = in_fresh_process(start_with_few_files)
    assert [num_left for _, num_left in outcomes] == [0] * len(outcomes)
    assert sum("no more processes can be started (Too many open files); fewer num" in said for said, _ in outcomes) > 2
    assert outcomes[-1][0] == ""


def test_an_error_in_the_block_kills_what_runs(tmp_path):
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupt_what_sleeps(tmp_path / "began")
    assert time.monotonic() - before < FOREVER
    pid = int((tmp_path / "began").read_text())
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=FOREVER)
    assert not psutil.pid_exists(pid) or gone
