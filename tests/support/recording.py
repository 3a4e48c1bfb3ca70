"""Trains with a loader that records, and kills it in the midst."""

import os
import signal
import time
from pathlib import Path

from tests.support.pace import FOREVER
from tests.support.processes import context
from tests.support.restore import Recipe


def train_until_killed(recipe: Recipe, record: Path, num_tables: int) -> None:
    """Train in a process of its own, which is killed when so many tables are in the folder that it records to."""
    process = context.Process(target=_train_for_ever, args=(recipe,))
    process.start()
    deadline = time.monotonic() + FOREVER
    while len(list(record.glob("*.parquet"))) < num_tables and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def _train_for_ever(recipe: Recipe) -> None:
    for _ in recipe.build(end="repeat", batches_per_epoch=10**9):
        pass
