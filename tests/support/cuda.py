"""Stands in for what CUDA graphs take of ``torch.cuda``."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock
from weakref import WeakSet

import pytest
import torch


class FakeGraph:
    """Of which only its place in memory counts."""

    pool: tuple[int, int] | None = None

    def replay(self) -> None:
        """Launch nothing."""


class FakeCuda:
    """Computes at once, and knows of a capture what torch 2.11 does.

    Of one that fails its allocator and its random numbers are not told that it has ended.

    Args:
        patch: Puts this in the place of ``torch.cuda``'s own.

    Attributes:
        captured_to: The memory pools that are being captured to, by the allocator's account.
        holds_random: Whether random numbers are taken for a capture's.
        began_in_inference_mode: Of each capture, whether it did.
        num_pools: How many memory pools were made.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.captured_to: set[tuple[int, int]] = set()
        self.holds_random, self.began_in_inference_mode = False, []
        self.num_pools, self._host_captured_to = 0, set()  # of page-locked memory there is an account, too
        self._used, self._graphs = set(), WeakSet()
        for name in ("Stream", "Event", "current_stream"):
            patch.setattr(torch.cuda, name, MagicMock())
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        patch.setattr(torch.cuda, "graph_pool_handle", self._new_pool)
        patch.setattr(torch.cuda, "graph", self._graph)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self._end, raising=False)

    def _new_pool(self) -> tuple[int, int]:
        self.num_pools += 1
        return (0, self.num_pools)

    @contextmanager
    def _graph(self, graph: FakeGraph, pool: tuple[int, int], *_: object, **__: object) -> Iterator[None]:
        if self.captured_to:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")  # of empty_cache()
        if pool in self._host_captured_to:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.began_in_inference_mode.append(torch.is_inference_mode_enabled())
        if pool in self._used and pool not in {each.pool for each in self._graphs}:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        graph.pool = pool
        self._used.add(pool)
        self._graphs.add(graph)
        self.captured_to.add(pool)
        self._host_captured_to.add(pool)
        self.holds_random = True
        yield
        self.captured_to.remove(pool)
        self._host_captured_to.remove(pool)
        self.holds_random = False

    def _end(self, _device: int, pool: tuple[int, int]) -> None:
        if pool not in self.captured_to:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.captured_to.remove(pool)
