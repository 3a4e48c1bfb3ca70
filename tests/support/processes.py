"""Runs functions of tests in real, fresh processes: one alone, or several as the ranks of a job."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from tests.support.pace import FOREVER

# Forked off a process that has imported torch and never used it: that is quick, and safe for its threads.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "clipfilter_wds.offline.run",
        "clipfilter_wds.models.scorer",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.image_processing_clip",
        "transformers.models.clip.tokenization_clip",
        "tests.support.processes",
    ]
)


def in_fresh_process(function: Callable[..., Any], *args: Any, timeout: float = FOREVER) -> Any:
    """What a function returns in a process of its own."""
    return run_ranks(1, function, *args, timeout=timeout)[0]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = FOREVER) -> list[Any]:
    """What ``function(*args)`` returns on each rank of a gloo job, all within a time limit; else the test fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_run_rank, args=(rank, world_size, folder, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        hung = _join(processes, timeout)
        results = [_load(folder / f"{rank}.pickle", processes[rank]) for rank in range(world_size)]
    errors = [f"rank {rank} of {world_size}: {error}" for rank, (_, error) in enumerate(results) if error]
    if hung or errors:
        pytest.fail(f"ranks still running after {timeout} s: {hung}\n" + "\n".join(errors))
    return [value for value, _ in results]


def _run_rank(rank: int, world_size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader workers, as it is by default on Linux
    if world_size > 1:
        where = f"file://{folder / 'rendezvous'}"
        distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    try:
        result = (function(*args), None)
    except BaseException:  # noqa: BLE001  # the test's process raises it
        result = (None, traceback.format_exc())
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    if world_size > 1 and result[1] is None:
        distributed.barrier()
        distributed.destroy_process_group()


def _join(processes: list[BaseProcess], timeout: float) -> list[int]:
    """Wait for all; those that are not done in time are killed, and their ranks returned."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in hung:
        processes[rank].kill()
        processes[rank].join()
    return hung


def _load(path: Path, process: BaseProcess) -> tuple[Any, str | None]:
    if not path.exists():
        return None, f"no result; exit code {process.exitcode}"
    return pickle.loads(path.read_bytes())
