"""Stands in for CUDA graphs on a CPU."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clipfilter_wds.models.fast.graphs import Captured


class CpuGraphs:
    """Replays by computing again, into the same memory; and as on a GPU, that breaks what the others have left.

    Attributes:
        num_captures: How many functions were captured.
        num_replays: How many times one of them was computed again.
        device: See :class:`clipfilter_wds.models.fast.graphs.Graphs`.
    """

    device = torch.device("cpu")
    can_capture = True

    def __init__(self) -> None:
        self._turn, self._is_in_turn = threading.Lock(), False
        self._outputs: list[Tensor] = []
        self.num_captures = self.num_replays = 0

    def __reduce__(self) -> tuple[type["CpuGraphs"], tuple[()]]:
        return type(self), ()

    def capture(self, compute: Callable[[], Tensor]) -> Captured:
        """Likewise."""
        assert self.can_capture
        output = compute().clone()
        self._outputs.append(output)
        self.num_captures += 1

        def replay() -> None:
            assert self._is_in_turn
            for other in self._outputs:
                other.fill_(torch.nan)
            output.copy_(compute())
            self.num_replays += 1

        return Captured(replay, output.fill_(torch.nan))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Likewise."""
        with self._turn:
            self._is_in_turn = True
            yield
            self._is_in_turn = False


class NoGraphs(CpuGraphs):
    """Can't capture anything."""

    can_capture = False
