"""What copies from shards that have been scored, in processes of its own."""

import os
import signal
from dataclasses import dataclass

import pytest

from clipfilter_wds.offline.engines.local import LocalEngine
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.types import ShardError
from clipfilter_wds.workers.tasks import TaskDiedError


@dataclass
class Copy:
    """Stands for a task that copies."""

    url: str
    error: Exception | None = None

    def __call__(self) -> ShardStats:
        if self.url == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.error is not None:
            raise self.error
        return ShardStats(torn=int(self.url))


@pytest.mark.parametrize("num_workers", [0, 1, 3, None])
def test_every_task_has_its_outcome(num_workers):
    tasks = [Copy(str(number)) for number in range(20)] + [Copy("20", ShardError("it is gone"))]
    outcomes = dict(LocalEngine(None).copy(tasks, num_workers))
    assert str(outcomes.pop("20")) == "it is gone"
    assert outcomes == {task.url: ShardStats(torn=int(task.url)) for task in tasks[:20]}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "out/0.tar"), ValueError("'0.parquet' is damaged; delete it")]
)
def test_an_error_that_ends_the_run_comes_as_it_is(error, num_workers):
    with pytest.raises(type(error)) as raised:
        list(LocalEngine(None).copy([Copy("0", error)], num_workers))
    assert str(raised.value) == str(error)


def test_a_process_that_is_killed_is_an_error_that_says_by_what():
    with pytest.raises(TaskDiedError, match=r"a process that writes shards died \(SIGKILL"):
        list(LocalEngine(None).copy([Copy("0"), Copy("dies"), Copy("1")], 2))
