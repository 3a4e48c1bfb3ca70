"""Shares slots of memory between workers, which fill them, and their parent, which empties them.

A slot is anonymous memory: it has no name in any folder, so it takes no room in ``/dev/shm``, and is gone with the last
process that holds it. Each worker has slots of its own, and one byte per slot says whose turn it is: the worker sets it
when it takes the slot, the parent clears it when it is done with what came in it. There is nothing to lock.
"""

import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from multiprocessing.sharedctypes import RawArray
from typing import Any

import torch

from clipfilter_wds.workers.page_lock import page_lock

#: Slots per worker: one that is filled while the other is emptied.
SLOTS_PER_WORKER = 2

#: Seconds between two looks at whether a slot has become free.
_POLL_SECONDS = 0.001

#: Tensors begin at multiples of so many bytes, as every type can be read there.
_ALIGNMENT = 64


class SlotsClosedError(RuntimeError):
    """The parent wants nothing more."""


class _File:
    """Anonymous memory that grows, mapped by any process that is handed it."""

    _fd = -1  # where there are too many already

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("clipfilter-slot")
        else:
            with tempfile.TemporaryFile() as file:
                self._fd = os.dup(file.fileno())
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __getstate__(self) -> Any:
        if get_spawning_popen() is None:
            raise TypeError("slots can be handed to processes that are being started only")
        return DupFd(self._fd)

    def __setstate__(self, duplicate: Any) -> None:
        self._fd = duplicate.detach()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def reserve(self, num_bytes: int) -> None:
        """Make it at least this large.

        Raises:
            MemoryError: When there is not so much memory.
        """
        try:
            if os.fstat(self._fd).st_size < num_bytes:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._fd, 0, num_bytes)
                else:
                    os.ftruncate(self._fd, num_bytes)
        except OSError as error:
            raise MemoryError(
                f"{num_bytes >> 20} MiB of memory for a batch of samples can't be had ({error.strerror}); "
                "a smaller batch_size, or fewer num_workers, take less"
            ) from error

    @property
    def has_grown(self) -> bool:
        """Whether :attr:`memory` will be another tensor than before."""
        return len(self._memory) < os.fstat(self._fd).st_size

    @property
    def memory(self) -> torch.Tensor:
        """All of it, uint8 ``[size]``."""
        if self.has_grown:
            memory = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
            self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        return self._memory


class Slots:
    """The slots of all workers of a loader. Made in the parent, and handed to the workers when they are started.

    Args:
        num_workers: Workers.
        per_worker: Slots of each.
        page_locked: Page-lock them in the parent, for a GPU.

    Attributes:
        num_made: Per worker, how many messages it has made.
    """

    def __init__(self, num_workers: int, per_worker: int = SLOTS_PER_WORKER, *, page_locked: bool = False) -> None:
        self.num_workers, self.per_worker, self._page_locked = num_workers, per_worker, page_locked
        self._files = [_File() for _ in range(num_workers * per_worker)]
        # One byte more says that the parent wants nothing more.
        self._taken = RawArray("B", len(self._files) + 1)
        self.num_made = RawArray("q", num_workers)

    def of_worker(self, worker: int) -> "WorkerSlots":
        """Those that a worker fills; made in the worker."""
        numbers = range(worker * self.per_worker, (worker + 1) * self.per_worker)
        return WorkerSlots(self._files, self._taken, numbers)

    def memory(self, slot: int) -> torch.Tensor:
        """The memory of a slot, uint8 ``[size]``."""
        file = self._files[slot]
        if file.has_grown and self._page_locked:
            page_lock(file.memory)
        return file.memory

    def release(self, slot: int) -> None:
        """Let the worker fill a slot again."""
        self._taken[slot] = 0

    def close(self) -> None:
        """Have workers that wait for a slot end."""
        self._taken[len(self._files)] = 1


class WorkerSlots:
    """The slots that a worker fills, one at a time."""

    def __init__(self, files: Sequence[_File], taken: Any, numbers: range) -> None:
        self._files, self._taken, self._numbers = files, taken, numbers
        self._open: int | None = None
        self._used = 0
        self._mapped: list[torch.Tensor] = []  # the open slot's memory; before it has grown, too

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Memory at the start of a free slot, which is waited for, uint8 ``[num_bytes]``: a ``BufferProvider``.

        Asked again before :meth:`send`, it gives the same memory again.

        Raises:
            SlotsClosedError: When the parent wants nothing more.
            MemoryError: When there is not so much memory.
        """
        self._used = 0
        return self._reserved(0, num_bytes)

    def place(self, tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
        """The offset of a tensor's first byte in the open slot, and its strides; what lies elsewhere is copied there.

        Raises likewise.
        """
        for memory in self._mapped:
            start = tensor.data_ptr() - memory.data_ptr()
            if 0 <= start < len(memory):
                return start, tensor.stride()
        dense, begin = tensor.contiguous(), self._used
        data = dense.view(-1).view(torch.uint8)
        self._reserved(begin, len(data)).copy_(data)
        return begin, dense.stride()

    def send(self) -> int | None:
        """The number of the open slot, which is the parent's now; None when there is none."""
        slot, self._open, self._used, self._mapped = self._open, None, 0, []
        return slot

    def _reserved(self, begin: int, num_bytes: int) -> torch.Tensor:
        """Memory of the open slot; one is taken if none is open."""
        slot = self._open = self._next_free() if self._open is None else self._open
        self._files[slot].reserve(begin + num_bytes)
        memory = self._files[slot].memory
        if not self._mapped or memory is not self._mapped[-1]:
            self._mapped.append(memory)
        self._used = begin + num_bytes + -num_bytes % _ALIGNMENT
        return memory[begin : begin + num_bytes]

    def _next_free(self) -> int:
        while True:
            if self._taken[len(self._files)]:
                raise SlotsClosedError("the workers are being stopped")
            for slot in self._numbers:
                if not self._taken[slot]:
                    self._taken[slot] = 1
                    return slot
            time.sleep(_POLL_SECONDS)
