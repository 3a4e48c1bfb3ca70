"""Gathers samples into batches that are ready to score."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipfilter_wds.preprocess.clip import ClipPreprocess, OpenPair
from clipfilter_wds.types import DropReason, SampleRow, UnusableError

#: Tensors up to this size go through a worker's pipe, larger ones in shared memory. To hand that over takes a dozen
#: system calls, and after each the receiver waits until its other threads let go of the interpreter.
_MAX_PIPED_BYTES = 1 << 18

#: Number of views, height and width -> memory for the views of a batch, uint8 ``[number, 3, height, width]``.
BufferProvider = Callable[[int, int, int], torch.Tensor]


def new_buffer(num_views: int, height: int, width: int) -> torch.Tensor:
    """Ordinary memory for the views of a batch: the usual :data:`BufferProvider`."""
    return torch.empty(num_views, 3, height, width, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedBatch:
    """Samples that are ready to score.

    Attributes:
        rows: Every sample, usable or not, in order.
        pixel_values: uint8 ``[N, 3, H, W]``, the view of each row without a ``reason``, in the order of the rows.
        input_ids: Their token ids, int64 ``[N, L]``, or ``[N, K, L]`` where images have several captions.
    """

    rows: list[SampleRow]
    pixel_values: torch.Tensor
    input_ids: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a scorer takes: ``pixel_values`` and ``input_ids``."""
        return self.pixel_values, self.input_ids

    def pin_memory(self) -> "PreparedBatch":
        """The same in page-locked memory (called by DataLoader)."""
        pixel_values, input_ids = self.pixel_values.pin_memory(), self.input_ids.pin_memory()
        return PreparedBatch(rows=self.rows, pixel_values=pixel_values, input_ids=input_ids)

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process: small tensors as arrays, and nothing of a buffer that holds no view."""
        return {
            name: _to_send(value) if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: torch.from_numpy(value) for name, value in state.items() if isinstance(value, np.ndarray)}
        vars(self).update(state | arrays)


def _to_send(tensor: torch.Tensor) -> torch.Tensor | np.ndarray:
    if tensor.nbytes <= _MAX_PIPED_BYTES:
        return tensor.numpy()
    return tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()


class BatchBuilder:
    """Gathers samples into a :class:`PreparedBatch`, whose views are written straight to the memory it will have.

    Args:
        preprocess: Prepares the samples.
        batch_size: The most samples of a batch.
        buffers: Gives the memory for each batch's views.
    """

    def __init__(self, preprocess: ClipPreprocess, batch_size: int, buffers: BufferProvider = new_buffer) -> None:
        self._preprocess, self._batch_size, self._buffers = preprocess, batch_size, buffers
        self._clear()

    def _clear(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._captions: list[list[str]] = []  # of the usable samples
        self._samples: list[tuple[str, int, bytes | None, OpenPair | DropReason]] = []

    def __len__(self) -> int:
        return len(self._samples)

    def add(
        self, key: str, index: int, open_pair: Callable[[torch.Tensor], OpenPair], *, uid: bytes | None = None
    ) -> DropReason | None:
        """Append a sample.

        Args:
            key: The sample's.
            index: Likewise.
            open_pair: Opens it and writes its view to uint8 ``[3, H, W]``; raises ``UnusableError`` where that can't
                be done.
            uid: The sample's, where it has one.

        Returns:
            Why the sample is unusable, None when it is not.
        """
        if self._buffer is None:
            self._buffer = self._buffers(self._batch_size, *self._preprocess.view.crop)
        try:
            pair = open_pair(self._buffer[len(self._captions)])
        except UnusableError as unusable:
            self._samples.append((key, index, uid, unusable.reason))
            return unusable.reason
        self._samples.append((key, index, uid, pair))
        self._captions.append(pair.captions)
        return None

    def build(self) -> PreparedBatch:
        """Make a batch of what was added, and begin the next one."""
        tokens = self._preprocess.tokenize(self._captions)
        counts = zip(tokens.num_tokens, tokens.truncated, strict=True)
        rows = [
            SampleRow(key, index, None, *next(counts), opened.width, opened.height, uid)
            if isinstance(opened, OpenPair)
            else SampleRow(key, index, opened, uid=uid)
            for key, index, uid, opened in self._samples
        ]
        buffer = new_buffer(0, *self._preprocess.view.crop) if self._buffer is None else self._buffer
        batch = PreparedBatch(rows=rows, pixel_values=buffer[: len(self._captions)], input_ids=tokens.input_ids)
        self._clear()
        return batch
