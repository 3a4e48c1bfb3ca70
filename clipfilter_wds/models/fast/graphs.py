"""Launches a function on a GPU as one CUDA graph per shape of its input, which costs the host next to nothing."""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from clipfilter_wds.models.fast.float32 import float32_products

_LOG = logging.getLogger(__name__)

#: Runs before a capture, in which libraries choose kernels and allocate what they need once.
_NUM_WARM_UPS = 2

#: The GPU's, or those of another release of torch, whose graphs are "in beta and may change".
_FAILURES = (RuntimeError, TypeError, AttributeError, AssertionError)

#: torch allows one capture at a time in a process, and older torch no replay beside it.
_TURN = threading.RLock()


class Captured(NamedTuple):
    """What a function has launched.

    Attributes:
        replay: Launches it again, on the current stream.
        output: Where the result then is, until the next replay of anything that shares its memory.
    """

    replay: Callable[[], object]
    output: Tensor


class Graphs(Protocol):
    """Captures what functions launch. All share the memory for what lies between input and output.

    Attributes:
        device: Where that is.
    """

    device: torch.device

    @property
    def can_capture(self) -> bool:
        """Whether it is worth a try, here and now."""

    def capture(self, compute: Callable[[], Tensor]) -> Captured | None:
        """Call a function and keep what it launches; None where that fails."""

    def turn(self) -> AbstractContextManager[None]:
        """A context to replay in: one at a time, whatever the thread and the stream."""


class GraphedFunction:
    """A function of rows, each for itself, that is computed in fixed shapes and captured once for each.

    Args:
        function: ``[R, ...]`` -> ``[R, D]``, without looking at values.
        graphs: Captures it. Where it does not, the function is called with the same shapes.
        fill: Number of rows -> the number that it is filled up to, R.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], graphs: Graphs, fill: Callable[[int], int]) -> None:
        self._function, self._graphs, self._fill = function, graphs, fill
        #: By shape and type of the input: its place, and what is replayed.
        self._captured: dict[object, tuple[Tensor, Captured]] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """``[n, ...]`` -> ``[n, D]``, in memory of its own."""
        num_rows = self._fill(len(rows))
        key = (num_rows, rows.shape[1:], rows.dtype)
        is_there = rows.device == self._graphs.device
        if is_there and key not in self._captured and self._graphs.can_capture:
            self._capture(key, rows, num_rows)
        if not is_there or key not in self._captured:
            return self._function(_filled_up(rows, num_rows))[: len(rows)]
        place, captured = self._captured[key]
        with self._graphs.turn():
            place[: len(rows)].copy_(rows, non_blocking=True)  # behind them are rows of earlier batches
            captured.replay()
            return captured.output[: len(rows)].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": {}}  # a copy reads weights elsewhere

    def clear(self) -> None:
        """Forget what was captured, since weights have moved."""
        self._captured.clear()

    def _capture(self, key: object, rows: Tensor, num_rows: int) -> None:
        filled = _filled_up(rows, num_rows)
        place = self._place_like(filled)
        with self._graphs.turn():
            place.copy_(filled)
        captured = self._graphs.capture(lambda: self._function(place))
        if captured is not None:
            self._captured[key] = (place, captured)

    def _place_like(self, rows: Tensor) -> Tensor:
        """Memory for such rows: that of a larger batch, since one is computed at a time."""
        for place, _ in self._captured.values():
            if len(place) >= len(rows) and (place.shape[1:], place.dtype) == (rows.shape[1:], rows.dtype):
                return place[: len(rows)]
        return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _filled_up(rows: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Free nothing here by chance, since to free page-locked memory would end a capture."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


class CudaGraphs:
    """Captures on a GPU, in the main thread only.

    While one thread captures, older torch lets no other draw random numbers on that GPU, so a thread that scores beside
    training must find its graphs ready. In other threads, what was not captured is launched as usual.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device, self._has_failed = torch.device(device.type, index), False
        self._pool: Any = None
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream, self._done = torch.cuda.Stream(self.device), torch.cuda.Event()

    def __reduce__(self) -> tuple[type["CudaGraphs"], tuple[torch.device]]:
        return type(self), (self.device,)  # streams and memory pools can't be copied

    @property
    def can_capture(self) -> bool:
        """See :class:`Graphs`. What fails once is not tried again."""
        return not self._has_failed and threading.current_thread() is threading.main_thread()

    def capture(self, compute: Callable[[], Tensor]) -> Captured | None:
        """See :class:`Graphs`."""
        with self.turn():
            try:
                return self._capture(compute)
            except _FAILURES as error:
                self._has_failed = True
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                _LOG.warning("CUDA graphs can't be used, so that a GPU may wait for the host: %s", reason)
                self._recover()
                return None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See :class:`Graphs`: what a stream launches here begins when what others launched here has ended."""
        stream = torch.cuda.current_stream(self.device)
        with _TURN:
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def _capture(self, compute: Callable[[], Tensor]) -> Captured:
        current = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        if not self._alive:  # torch takes no memory again of which all graphs are gone
            self._pool = torch.cuda.graph_pool_handle()
        with float32_products(torch.device("cuda")):
            # Not on the stream of the capture, so that cuBLAS's workspace for that one is allocated in the graphs' own
            # memory: other workspaces can be freed, as a compiler does that uses graphs too.
            for _ in range(_NUM_WARM_UPS):
                compute()
            self._stream.wait_stream(current)
            # Not in inference mode, since the first capture makes what a capture in training writes to in older torch.
            # The next context gives the current stream back where the capture fails; torch's own does not. Other
            # threads may allocate memory meanwhile, such as the one that puts batches in page-locked memory.
            with (
                _without_garbage_collection(),
                torch.inference_mode(False),
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
                torch.inference_mode(),
            ):
                output = compute()
        current.wait_stream(self._stream)
        self._alive.add(graph)
        return Captured(graph.replay, output)

    def _recover(self) -> None:
        """Have torch know that the failed capture has ended, which before 2.12 it does not where the GPU ended it."""
        # Else no memory that was used on several streams would be used again, and empty_cache() would fail.
        names = "_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"  # since 2.8, and before
        end: Any = next(filter(None, (getattr(torch._C, name, None) for name in names)), None)
        with suppress(*_FAILURES):  # it has ended
            end(self.device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()  # page-locked memory is still taken for the failed one's
        try:
            self._capture(lambda: torch.zeros(1, device=self.device))  # so that random numbers are not, either
        except _FAILURES:
            _LOG.debug("the GPU could not capture anything", exc_info=True)
