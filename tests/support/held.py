"""Measures what a process and those that it started hold of the machine."""

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median

import psutil


@dataclass(frozen=True)
class Held:
    """What a process and its children hold.

    Attributes:
        num_processes: Itself and its children.
        mapped: Bytes of anonymous and shared memory that each has, summed. What they share since the fork counts in
            each, so this does not grow when one of them writes to its own copy, as a garbage collection does.
        memory: The same, but what several have counts once. Pages of files, such as libraries, are in neither: whose
            they are depends on who else on the machine has them.
        shared_memory: Of ``memory``, shared memory.
        num_shared: Pieces of shared memory that are mapped (tensors on their way, mostly), or named in /dev/shm.
        num_files: Open files, pipes and sockets.
        num_threads: Threads.
    """

    num_processes: float
    mapped: float
    memory: float
    shared_memory: float
    num_shared: float
    num_files: float
    num_threads: float

    @classmethod
    def by(cls, root: psutil.Process) -> "Held":
        """Look now.

        Raises:
            psutil.NoSuchProcess, OSError: When one of them ends meanwhile.
        """
        processes = [root, *root.children(recursive=True)]
        rollups = [Path(f"/proc/{process.pid}/smaps_rollup").read_text() for process in processes]
        mapped, memory, shared_memory = (
            sum(_bytes_of(kind, rollup) for rollup in rollups) for kind in ("Anonymous", "Pss_Anon", "Pss_Shmem")
        )
        return cls(
            num_processes=len(processes),
            mapped=mapped + shared_memory,
            memory=memory + shared_memory,
            shared_memory=shared_memory,
            num_shared=sum(map(_num_shared, processes)),
            num_files=sum(process.num_fds() for process in processes),
            num_threads=sum(process.num_threads() for process in processes),
        )

    @classmethod
    def median_of(cls, looks: Sequence["Held"]) -> "Held":
        """Of each number; one odd look decides nothing."""
        return cls(*map(median, zip(*map(astuple, looks), strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.mapped / 2**20:.1f} MiB mapped, {self.memory / 2**20:.1f} MiB held, "
            f"{self.shared_memory / 2**20:.1f} of them shared in {self.num_shared:g}, "
            f"{self.num_files:g} files, {self.num_threads:g} threads, {self.num_processes:g} processes"
        )


def _bytes_of(kind: str, rollup: str) -> int:
    return int(re.search(rf"^{kind}: +(\d+) kB", rollup, re.MULTILINE)[1]) << 10


def _num_shared(process: psutil.Process) -> int:
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return len(re.findall("/dev/shm/|/torch_", maps)) + len(list(Path("/dev/shm").glob(f"*_{process.pid}_*")))
