"""Gathers samples into batches that are ready to score."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from clipfilter_wds.preprocess.clip import ClipPreprocess, ImageOut, OpenPair
from clipfilter_wds.preprocess.packed import BufferProvider, ImagePacker, Images
from clipfilter_wds.preprocess.rows import SampleRows, code_of
from clipfilter_wds.types import NO_REASON, DropReason, UnusableError


def new_buffer(num_bytes: int) -> torch.Tensor:
    """Ordinary memory: the usual :data:`BufferProvider`."""
    return torch.empty(num_bytes, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedBatch:
    """Samples that are ready to score.

    Attributes:
        rows: Every sample, usable or not, in order.
        pixel_values: uint8 ``[N, 3, H, W]``, the view of each row without a ``reason``, in the order of the rows.
            Contiguous; or interleaved, a pixel's three colours and a byte of padding after another. Or the images that
            the device makes them of.
        input_ids: Their token ids, int64 ``[N, L]``, or ``[N, K, L]`` where images have several captions.
    """

    rows: SampleRows
    pixel_values: Images
    input_ids: torch.Tensor

    @property
    def inputs(self) -> tuple[Images, torch.Tensor]:
        """What a scorer takes: ``pixel_values`` and ``input_ids``."""
        return self.pixel_values, self.input_ids


class BatchBuilder:
    """Gathers samples into a :class:`PreparedBatch`, whose views are written straight to the memory it will have.

    Args:
        preprocess: Prepares the samples.
        batch_size: The most samples of a batch.
        buffers: Gives the memory for each batch's views.
        interleaved: Keep a pixel's colours together, as decoders do. It spares a worker a fifth of its time with small
            images, and a GPU sorts them in none.
    """

    def __init__(
        self,
        preprocess: ClipPreprocess,
        batch_size: int,
        buffers: BufferProvider = new_buffer,
        *,
        interleaved: bool = False,
    ) -> None:
        self._preprocess, self._batch_size = preprocess, batch_size
        self._buffers, self._interleaved = buffers, interleaved
        self._packer = ImagePacker(preprocess.view, batch_size, buffers) if preprocess.view.resize_on_device else None
        self._clear()

    def _clear(self) -> None:
        self._views: torch.Tensor | None = None
        self._captions: list[list[str]] = []  # of the usable samples
        self._keys: list[str] = []
        self._indices: list[int] = []
        self._reasons: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._uids: list[bytes | None] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(
        self, key: str, index: int, open_pair: Callable[[ImageOut], OpenPair], *, uid: bytes | None = None
    ) -> DropReason | None:
        """Append a sample.

        Args:
            key: The sample's.
            index: Likewise.
            open_pair: Opens it and puts its image there; raises ``UnusableError`` where that can't be done.
            uid: The sample's, where it has one.

        Returns:
            Why the sample is unusable, None when it is not.
        """
        reason, size = None, (0, 0)
        try:
            pair = open_pair(self._next_image())
        except UnusableError as unusable:
            reason = unusable.reason
        else:
            self._captions.append(pair.captions)
            size = pair.width, pair.height
        self._keys.append(key)
        self._indices.append(index)
        self._reasons.append(code_of(reason))
        self._sizes.append(size)
        self._uids.append(uid)
        return reason

    def _next_image(self) -> ImageOut:
        """Where the image of the next usable sample goes."""
        number = len(self._captions)
        if self._packer is not None:
            return self._packer.at(number)
        if self._views is None:
            self._views = self._new_views()
        return self._views[number]

    def _new_views(self) -> torch.Tensor:
        """uint8 ``[batch_size, 3 or 4, H, W]``."""
        height, width = self._preprocess.view.crop
        num_bytes = self._batch_size * self._preprocess.view_bytes(interleaved=self._interleaved)
        memory = self._buffers(num_bytes)[:num_bytes]
        if self._interleaved:
            return memory.view(self._batch_size, height, width, 4).permute(0, 3, 1, 2)
        return memory.view(self._batch_size, 3, height, width)

    def build(self) -> PreparedBatch:
        """Make a batch of what was added, and begin the next one."""
        tokens = self._preprocess.tokenize(self._captions)
        counts = iter(zip(tokens.num_tokens, tokens.truncated, strict=True))
        numbers = [
            (index, reason, *(next(counts) if reason == NO_REASON else (0, False)), *size)
            for index, reason, size in zip(self._indices, self._reasons, self._sizes, strict=True)
        ]
        rows = SampleRows.of_columns(self._keys, self._uids, numbers)
        batch = PreparedBatch(rows=rows, pixel_values=self._images(), input_ids=tokens.input_ids)
        self._clear()
        return batch

    def _images(self) -> Images:
        """Those of the usable samples."""
        number = len(self._captions)
        if self._packer is not None:
            return self._packer.at(number).build()
        if self._views is None:
            return torch.empty(0, 3, *self._preprocess.view.crop, dtype=torch.uint8)
        return self._views[:number, :3]
