"""Builds batches of a worker's samples."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from clipfilter_wds.preprocess.clip import ClipPreprocess, OpenPair, sample_rows
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.preprocess.members import decode_sample
from clipfilter_wds.preprocess.tokens import Tokens
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.stream import PartEnd, Position, StreamSample
from clipfilter_wds.types import DropReason, Sample, SampleRow, UnusableError
from clipfilter_wds.workers.crashes import WorkerTracker

ImageTransform = Callable[[Image.Image], Any]
TextTransform = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchSettings:
    """How samples become a batch.

    Attributes:
        layout: Which members are image and caption.
        view: How images are decoded.
        preprocess: Prepares what is to be scored; None where all scores are known.
        image_transform: RGB image -> the training view of it; None gives CLIP's own view.
        text_transform: Caption -> its training view; None gives the caption.
    """

    layout: SampleLayout
    view: ImageView
    preprocess: ClipPreprocess | None
    image_transform: ImageTransform | None
    text_transform: TextTransform | None


@dataclass(frozen=True, kw_only=True)
class StreamBatch:
    """Consecutive samples of one worker's stream, and where the stream goes on.

    Attributes:
        worker: Whose they are.
        after: The worker's position after this batch.
        urls: Per row, the shard.
        rows: Every sample, usable or not.
        is_known: Per row, whether its score was known before it was read, bool.
        known_scores: Per row, that score, float32; 0.0 where there is none.
        pixel_values: uint8 ``[N, 3, H, W]``, CLIP's views of the rows that are to be scored: without a ``reason``, and
            not known.
        input_ids: int64 ``[N, L]``, likewise.
        has_views: Per row, whether training may get it, bool: usable, and not known to be dropped.
        views: What training gets of these rows, collated: ``image`` and ``text``.
        failures: Shards that could not be used, with the reason.
        ends: Shards of which this worker's samples are all given, in this batch or before, and what is at their end.
        num_bytes: Size of the rows' shards as stored, -1 when unknown.
    """

    worker: int
    after: Position
    urls: list[str]
    rows: list[SampleRow]
    is_known: np.ndarray
    known_scores: np.ndarray
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    has_views: np.ndarray
    views: dict[str, Any]
    failures: list[tuple[str, str]]
    ends: list[PartEnd]
    num_bytes: dict[str, int]


class BatchBuilder:
    """Gathers samples until they are made a batch of."""

    def __init__(self, worker: int, settings: BatchSettings, worker_tracker: WorkerTracker) -> None:
        self._worker, self._settings, self._worker_tracker = worker, settings, worker_tracker
        #: How images are decoded for training's own transform, which gets none at a reduced size.
        self._whole = replace(settings.view, fast_decode=False)
        self._clear()

    def _clear(self) -> None:
        self._items: list[StreamSample] = []
        self._reasons: list[DropReason | None] = []
        self._fresh: list[tuple[Sample, OpenPair | DropReason]] = []  # of the items those that are not known
        self._has_views: list[bool] = []
        self._images: list[Any] = []
        self._texts: list[Any] = []
        self.failures: list[tuple[str, str]] = []
        self.ends: list[PartEnd] = []

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: StreamSample) -> None:
        """Decode a sample, unless it is known to be dropped."""
        reason = item.known.reason if item.known else None
        keep = item.known is None or item.known.keep
        if keep:
            try:
                with self._worker_tracker.at(item.url, item.sample.index):
                    self._decode(item)
            except UnusableError as unusable:
                reason, keep = unusable.reason, False
                if item.known is None:
                    self._fresh.append((item.sample, reason))
        self._items.append(item)
        self._reasons.append(reason)
        self._has_views.append(keep)

    def _decode(self, item: StreamSample) -> None:
        settings, sample, transform = self._settings, item.sample, self._settings.image_transform
        only_training = transform is not None and item.known is not None
        rgb, captions = decode_sample(sample, settings.layout, self._whole if only_training else settings.view)
        whole = rgb
        if transform is not None and rgb.scale > 1:
            whole, _ = decode_sample(sample, settings.layout, self._whole)
        view = None
        if item.known is None:
            if settings.preprocess is None:
                raise ValueError("the dataset has no preprocess, so it can't be scored")
            pair = settings.preprocess.prepare(rgb, captions)
            self._fresh.append((sample, pair))
            view = pair.pixels
        if transform is not None:
            view = transform(whole.image)
        self._images.append(settings.view(rgb) if view is None else view)
        self._texts.append(captions[0] if len(captions) == 1 else captions)

    def build(self, after: Position) -> StreamBatch:
        """Make a batch of what was added, and begin the next one."""
        settings = self._settings
        fresh = [opened for _, opened in self._fresh if isinstance(opened, OpenPair)]
        pixel_values, tokens = settings.preprocess.collate(fresh) if settings.preprocess else _NOTHING_TO_SCORE
        # The very tensor, where all is to be scored and CLIP's views are what training gets, so that it is sent once.
        same = settings.image_transform is None and len(fresh) == len(self._images)
        texts = self._texts if settings.text_transform is None else list(map(settings.text_transform, self._texts))
        known = [item.known for item in self._items]
        batch = StreamBatch(
            worker=self._worker,
            after=after,
            urls=[item.url for item in self._items],
            rows=self._build_rows(tokens),
            is_known=np.array([entry is not None for entry in known], dtype=bool),
            known_scores=np.array([entry.score if entry else 0.0 for entry in known], dtype=np.float32),
            pixel_values=pixel_values,
            input_ids=tokens.input_ids,
            has_views=np.array(self._has_views, dtype=bool),
            views={
                "image": pixel_values if same else _collate(self._images),
                "text": texts if settings.text_transform is None else _collate(texts),
            },
            failures=self.failures,
            ends=self.ends,
            num_bytes={item.url: item.num_bytes for item in self._items},
        )
        self._clear()
        return batch

    def _build_rows(self, tokens: Tokens) -> list[SampleRow]:
        fresh = iter(sample_rows(self._fresh, tokens))
        return [
            next(fresh) if item.known is None else SampleRow(item.sample.key, item.sample.index, reason)
            for item, reason in zip(self._items, self._reasons, strict=True)
        ]


_NOTHING_TO_SCORE = (
    torch.empty(0, 3, 0, 0, dtype=torch.uint8),
    Tokens(torch.empty(0, 0, dtype=torch.int64), num_tokens=[], truncated=[]),
)


def _collate(views: list[Any]) -> Any:
    return default_collate(views) if views else []
