"""Shares a run among several devices of this machine: a process for each, as torchrun would start them."""

import gc
import json
import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, start_processes

from clipfilter_wds.offline.engines.board import Board
from clipfilter_wds.workers.cpus import num_cpus
from clipfilter_wds.workers.crashes import WorkerError
from clipfilter_wds.workers.interrupts import interrupted_by
from clipfilter_wds.workers.process import starting
from clipfilter_wds.world import World

#: Seconds that processes have to end by themselves after SIGTERM.
_GRACE_SECONDS = 1.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOPPED = 128 + signal.SIGTERM

#: What a process does: its place among all, and how far they are -> whether shards failed. Picklable.
Run = Callable[[World, Board], bool]


def num_processes(devices: Literal["auto"] | int | None, device: str) -> int:
    """How many processes share a run: one for each device that is asked for.

    Args:
        devices: A number; ``auto`` for all GPUs, or one process where none is to be used; None for one.
        device: What each of them computes on, as ``ScorerConfig`` has it.

    Raises:
        ValueError: When there are fewer GPUs, or ``device`` names a certain one.
    """
    if devices is None:
        return 1
    if ":" in device:
        raise ValueError(f"device is {device!r}, which is one device, and devices is {devices}; give one of them")
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if devices == "auto":
        return max(1, num_gpus)
    if 0 < num_gpus < devices:
        raise ValueError(f"devices is {devices}, but this machine has {num_gpus} CUDA devices; auto takes all of them")
    return devices


def run_on_devices(num: int, run: Run) -> bool:
    """Run a function in ``num`` processes of their own, which end together.

    Returns:
        Whether shards failed, as rank zero says.

    Raises:
        ValueError: Of the process that raises one first.
        ChildProcessError: When a process can't do its part, or dies; it says which.
    """
    logging.getLogger(start_processes.__module__).setLevel(logging.ERROR)  # it warns of every process that it ends
    with TemporaryDirectory(prefix="clipfilter-") as folder, _started(num, run, folder) as processes:
        try:
            while not processes.join():
                pass
        except ProcessExitedException as ended:
            raise _failure(ended, num, Path(folder)) from None
        return bool(_read_outcome(Path(folder), 0)["shards_failed"])


@contextmanager
def _started(num: int, run: Run, folder: str) -> Iterator[ProcessContext]:
    """The processes, none of which is left at the end of the block."""
    # A signal waits until all are known, and in each until it can answer: else it could not be handed on.
    before, others = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS), {*multiprocessing.active_children()}
    try:
        arguments = num, run, Board(num), folder, multiprocessing.get_start_method()
        with starting():
            context = start_processes(_run_rank, arguments, nprocs=num, join=False)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _end([process for process in multiprocessing.active_children() if process not in others])
        raise
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield context
    finally:
        _end(context.processes)


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.terminate()
    until = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
        process.join()


def _failure(ended: ProcessExitedException, num: int, folder: Path) -> Exception:
    """Why a run failed one of whose processes has ended."""
    outcome = _read_outcome(folder, ended.error_index)
    if "error" in outcome:
        return ValueError(outcome["error"]) if outcome["is_unusable"] else ChildProcessError(outcome["error"])
    how = f"killed by {ended.signal_name}" if ended.signal_name else f"exit code {ended.exit_code}"
    hint = ", as a system that is out of memory does" if ended.signal_name == "SIGKILL" else ""
    who = f"the process of device {ended.error_index} (rank {ended.error_index} of {num}, process {ended.error_pid})"
    return ChildProcessError(f"{who} died ({how}{hint}), so the others were stopped")


def _run_rank(rank: int, num: int, run: Run, board: Board, folder: str, start_method: str) -> None:
    """Be one of the processes. Exits with a code other than 0 unless all is done."""
    gc.freeze()  # modules are no garbage; at its end, too, the process would look through them, for a second
    try:
        with interrupted_by(*_SIGNALS):  # Ctrl-C reaches every process of a terminal; whichever comes first
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            multiprocessing.set_start_method(start_method, force=True)  # a spawned process would spawn its workers, too
            parent = multiprocessing.parent_process()
            if parent is None or not parent.is_alive():
                return  # it died before it could have been told of
            torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cpus() // num)))
            world = World(rank=rank, world_size=num, local_rank=rank, local_world_size=num)
            outcome: dict[str, Any] = {"shards_failed": run(world, board)}
    except KeyboardInterrupt:
        sys.exit(_STOPPED)
    except (ValueError, OSError, WorkerError) as error:
        outcome = {"error": str(error), "is_unusable": isinstance(error, ValueError)}
    _outcome_file(Path(folder), rank).write_text(json.dumps(outcome))
    if "error" in outcome:
        sys.exit(1)


def _outcome_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def _read_outcome(folder: Path, rank: int) -> dict[str, Any]:
    """What a process has said at its end; nothing if it died."""
    file = _outcome_file(folder, rank)
    outcome: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    return outcome
