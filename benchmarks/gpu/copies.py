"""Measures copies to the GPU, and whether they overlap with computing."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.scale import B32
from benchmarks.gpu.timing import seconds_of


def copies(bench: Bench) -> dict[str, Any]:
    """GB/s, and milliseconds of the image tower with and without a copy beside it."""
    pinned, _ = bench.inputs(B32, bench.scale.train_batch)
    pageable, there = pinned.clone(), pinned.to(bench.device)
    tower = bench.scorer(B32).fast.encode_image

    def seconds(work: Any) -> float:
        return seconds_of(work, bench.device, least=bench.scale.seconds)

    found = {
        "MB": round(pinned.nbytes / 1e6, 1),
        "page-locked GB/s": _rate(pinned, seconds(lambda: there.copy_(pinned, non_blocking=True))),
        "pageable GB/s": _rate(pinned, seconds(lambda: there.copy_(pageable))),
        "tower ms": round(1e3 * seconds(lambda: tower(there)), 3),
        "copy, then tower, ms": round(1e3 * seconds(lambda: tower(pinned)), 3),
    }
    if bench.device.type == "cuda":
        found["copy beside tower, ms"] = round(1e3 * seconds(_Overlapped(tower, pinned, there)), 3)
    return found


def _rate(tensor: Tensor, seconds: float) -> float:
    return round(tensor.nbytes / seconds / 1e9, 2)


class _Overlapped:
    """Copies the next batch on a stream of its own while the tower computes the last."""

    def __init__(self, tower: Any, pinned: Tensor, there: Tensor) -> None:
        self._tower, self._pinned, self._turn = tower, pinned, 0
        self._side, self._batches = torch.cuda.Stream(), [there, there.clone()]
        self._copied, self._used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def __call__(self) -> None:
        self._turn = 1 - self._turn
        now, last = self._turn, 1 - self._turn
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._used[now])
            self._batches[now].copy_(self._pinned, non_blocking=True)
            self._copied[now].record(self._side)
        torch.cuda.current_stream().wait_event(self._copied[last])
        self._tower(self._batches[last])
        self._used[last].record()
