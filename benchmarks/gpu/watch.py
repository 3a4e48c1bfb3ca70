"""Watches the load of the GPU and the memory of all processes while something runs."""

import threading
from contextlib import suppress
from statistics import mean
from typing import Any, Self

import psutil
import torch

_SECONDS = 0.1
#: To add up what processes hold takes a while, in which they can get no more: after how many looks, and how often.
_MEMORY_AFTER, _MEMORY_EVERY = 5, 40


class Watch:
    """In its context a thread looks ten times a second.

    Args:
        device: What is computed on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._loads, self._host_bytes = device, [], 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="benchmark-watch", daemon=True)

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        turn = 0
        while not self._ended.wait(_SECONDS):
            if self._device.type == "cuda":
                with suppress(Exception):  # where the driver does not tell, there is a figure less
                    self._loads.append(torch.cuda.utilization(self._device))
            if turn % _MEMORY_EVERY == _MEMORY_AFTER:
                self._host_bytes = max(self._host_bytes, _unshared_bytes())
            turn += 1

    @property
    def figures(self) -> dict[str, Any]:
        """Per cent of the time that the GPU computed anything; most GiB on the GPU, and of all processes (USS)."""
        found = {"host_gib": round(self._host_bytes / 2**30, 2)}
        if self._device.type == "cuda":
            busy = self._loads[len(self._loads) // 5 :]
            found |= {
                "gpu_load_%": round(mean(busy)) if busy else None,
                "gpu_gib": round(torch.cuda.max_memory_allocated(self._device) / 2**30, 2),
            }
        return found


def _unshared_bytes() -> int:
    total, root = 0, psutil.Process()
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # one has just ended
            total += process.memory_full_info().uss
    return total
