"""Builds a worker's batches: samples to score, what training gets of them, and where the stream continues."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from clipfilter_wds.preprocess.batch import BatchBuilder, PreparedBatch
from clipfilter_wds.preprocess.clip import ClipPreprocess, ImageOut, OpenPair
from clipfilter_wds.preprocess.image import ImageView, RgbImage
from clipfilter_wds.preprocess.members import decode_sample, read_uid
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.collate import collate
from clipfilter_wds.training.member_columns import MemberColumns
from clipfilter_wds.training.rebatch import take
from clipfilter_wds.training.stream import PartEnd, StreamProgress, StreamSample
from clipfilter_wds.training.user_code import collating, running
from clipfilter_wds.types import DropReason, SampleRow, ShardIdentity, UnusableError
from clipfilter_wds.workers.crashes import WorkerTracker
from clipfilter_wds.workers.transport import slot_buffer

ImageTransform = Callable[[Image.Image], Any]
TextTransform = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchSettings:
    """How samples become a batch.

    Attributes:
        batch_size: Samples per batch, unusable ones included.
        layout: Which members are image and caption.
        view: How images are decoded.
        preprocess: Prepares what is to be scored; None where all scores are known.
        image_transform: RGB image -> the training view of it; None gives CLIP's own view.
        text_transform: Caption -> its training view; None gives the caption.
        members: Which other members become columns.
        interleaved: Interleave the views that CLIP gets, where training gets others; see ``BatchBuilder``.
    """

    batch_size: int
    layout: SampleLayout
    view: ImageView
    preprocess: ClipPreprocess | None
    image_transform: ImageTransform | None
    text_transform: TextTransform | None
    members: MemberColumns = field(default_factory=MemberColumns)
    interleaved: bool = False

    @property
    def is_interleaved(self) -> bool:
        """Whether CLIP's views are interleaved."""
        return self.interleaved and self.image_transform is not None

    @property
    def batch_bytes(self) -> int:
        """Size of CLIP's views of a batch."""
        if self.preprocess is None:
            return 0
        return self.batch_size * self.preprocess.view_bytes(interleaved=self.is_interleaved)


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamBatch:
    """Consecutive samples of a stream, and where the stream continues.

    Attributes:
        worker: The worker that has read it.
        stream: The stream's number.
        after: How far the stream is after this batch.
        urls: The shards of the rows.
        url_of: Per row, its place in ``urls``, int32 ``[num_rows]``.
        rows: Every sample, usable or not.
        is_known: Per row, whether its score was known before it was read, bool.
        known_scores: Per row, that score, float32; 0.0 where there is none.
        prepared: The rows that are not known, ready to score.
        has_views: Per row, whether training may get it, bool: usable, and not known to be dropped.
        images: What training gets of the images of these rows, collated; None where it is ``prepared.pixel_values``,
            which are then sent once.
        texts: What training gets of their captions, collated.
        others: What training gets of their other members, and of their rows in the score table, by column.
        failures: Shards that could not be used, with the reason.
        ends: Shards of which this stream's samples are all given, in this batch or before, and what is at their end.
        identities: What the storage tells of the rows' shards.
    """

    worker: int
    stream: int
    after: StreamProgress
    urls: list[str]
    url_of: np.ndarray
    rows: SampleRows
    is_known: np.ndarray
    known_scores: np.ndarray
    prepared: PreparedBatch
    has_views: np.ndarray
    images: Any
    texts: Any
    others: dict[str, Any]
    failures: list[tuple[str, str]]
    ends: list[PartEnd]
    identities: dict[str, ShardIdentity]

    @property
    def views(self) -> dict[str, Any]:
        """What training gets of the rows that it may get, collated: ``image``, ``text``, and other columns."""
        image = self.prepared.pixel_values if self.images is None else self.images
        return {"image": image, "text": self.texts, **self.others}

    def unpicklable_sample(self) -> str | None:
        """See ``NamesSamples``."""
        for place, row in enumerate(np.flatnonzero(self.has_views).tolist()):
            try:
                pickle.dumps(take(self.views, np.array([place])))
            except Exception:  # noqa: BLE001  # what it may be depends on what it is
                return f"sample {self.rows.keys[row]!r} of {public_url(self.urls[self.url_of[row]])}"
        return None

    def without_views(self) -> Self:
        """The same but for its tensors."""
        prepared = replace(_NOTHING_TO_SCORE, rows=self.prepared.rows)
        return replace(self, prepared=prepared, images=[], texts=[], others={})


class StreamBatchBuilder:
    """Gathers a worker's samples into batches."""

    def __init__(self, worker: int, settings: BatchSettings, worker_tracker: WorkerTracker) -> None:
        self._worker, self._settings, self._worker_tracker = worker, settings, worker_tracker
        #: How images are decoded for training's own transform, which gets none at a reduced size.
        self._whole = replace(settings.view, fast_decode=False)
        self._to_score = None
        if settings.preprocess is not None:
            self._to_score = BatchBuilder(
                settings.preprocess, settings.batch_size, slot_buffer, interleaved=settings.is_interleaved
            )
        self._clear()

    def _clear(self) -> None:
        self._items: list[StreamSample] = []
        self._reasons: list[DropReason | None] = []
        self._has_views: list[bool] = []
        self._images: list[Any] = []
        self._texts: list[Any] = []
        self._others: list[dict[str, Any]] = []
        self.failures: list[tuple[str, str]] = []
        self.ends: list[PartEnd] = []

    @property
    def is_full(self) -> bool:
        """Whether there are enough samples for a batch."""
        return len(self._items) == self._settings.batch_size

    def add(self, item: StreamSample) -> None:
        """Decode a sample, unless it is known to be dropped."""
        reason, may_be_kept = (item.known.reason, item.known.keep) if item.known else (None, True)
        if may_be_kept:
            with self._worker_tracker.at(item.url, item.sample.index):
                reason = self._open(item)
        self._items.append(item)
        self._reasons.append(reason)
        self._has_views.append(may_be_kept and reason is None)

    def _open(self, item: StreamSample) -> DropReason | None:
        """Open a sample for training, and to score it if its score is not known; returns why that can't be done."""
        sample = item.sample
        if item.known is None:
            assert self._to_score is not None, "only a dataset with a preprocess has samples that are to be scored"
            return self._to_score.add(sample.key, sample.index, partial(self._prepare, item), uid=read_uid(sample))
        settings, transform = self._settings, self._settings.image_transform
        try:
            rgb, captions = decode_sample(sample, settings.layout, settings.view if transform is None else self._whole)
            self._add_views(item, settings.view(rgb) if transform is None else self._image_view(item, rgb), captions)
        except UnusableError as unusable:
            return unusable.reason
        return None

    def _prepare(self, item: StreamSample, out: ImageOut) -> OpenPair:
        """Open a sample to score it, and for training."""
        sample, settings, transform = item.sample, self._settings, self._settings.image_transform
        assert settings.preprocess is not None
        rgb, captions = decode_sample(sample, settings.layout, settings.preprocess.decoder(out))
        whole = rgb
        if transform is not None and rgb.scale > 1:
            whole, _ = decode_sample(sample, settings.layout, self._whole)
        pair = settings.preprocess.prepare(rgb, captions, out)
        self._add_views(item, pair.pixels if transform is None else self._image_view(item, whole), captions)
        return pair

    def _image_view(self, item: StreamSample, rgb: RgbImage) -> Any:
        """Training's own view of an image."""
        assert self._settings.image_transform is not None
        with running("image_transform", item.sample.key, item.url):
            return self._settings.image_transform(rgb.image)

    def _add_views(self, item: StreamSample, image: Any, captions: list[str]) -> None:
        self._images.append(image)
        self._texts.append(captions[0] if len(captions) == 1 else captions)
        with running("sample_transform", item.sample.key, item.url):
            self._others.append(self._settings.members.row_of(item.sample, item.url))

    def build(self, stream: int, after: StreamProgress) -> StreamBatch:
        """Make a batch of what was added of a stream, and begin the next one."""
        prepared = _NOTHING_TO_SCORE if self._to_score is None else self._to_score.build()
        are_clips_views = self._settings.image_transform is None and len(prepared.pixel_values) == len(self._images)
        known = [item.known for item in self._items]
        numbers = {url: number for number, url in enumerate(dict.fromkeys(item.url for item in self._items))}
        batch = StreamBatch(
            worker=self._worker,
            stream=stream,
            after=after,
            urls=list(numbers),
            url_of=np.array([numbers[item.url] for item in self._items], dtype=np.int32),
            rows=self._all_rows(prepared),
            is_known=np.array([entry is not None for entry in known], dtype=bool),
            known_scores=np.array([entry.score if entry else 0.0 for entry in known], dtype=np.float32),
            prepared=prepared,
            has_views=np.array(self._has_views, dtype=bool),
            images=None if are_clips_views else self._collated_images(),
            texts=self._text_views(),
            others=self._other_columns(),
            failures=self.failures,
            ends=self.ends,
            identities={item.url: item.identity for item in self._items},
        )
        self._clear()
        return batch

    def _collated_images(self) -> Any:
        with collating("image_transform"):
            return collate(self._images)

    def _text_views(self) -> Any:
        """What training gets of the captions, collated where it gets views of its own."""
        transform, texts = self._settings.text_transform, []
        if transform is None:
            return self._texts
        items = compress(self._items, self._has_views)
        for item, text in zip(items, self._texts, strict=True):
            with running("text_transform", item.sample.key, item.url):
                texts.append(transform(text))
        with collating("text_transform"):
            return collate(texts)

    def _other_columns(self) -> dict[str, Any]:
        with collating("sample_transform"):
            columns = self._settings.members.collate(self._others)
        of_tables = self._score_columns()
        if twice := sorted(columns.keys() & of_tables.keys()):
            raise ValueError(f"a batch has two columns {twice[0]!r}, of its members and of score_columns; rename one")
        return {**columns, **of_tables}

    def _score_columns(self) -> dict[str, Any]:
        pairs = zip(self._items, self._has_views, strict=True)
        rows = [item.known.values for item, has_views in pairs if has_views and item.known is not None]
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
        return {
            name: torch.tensor(values, dtype=torch.float32) if isinstance(values[0], float) else values
            for name, values in columns.items()
        }

    def _all_rows(self, prepared: PreparedBatch) -> SampleRows:
        is_known = np.array([item.known is not None for item in self._items], dtype=bool)
        if not is_known.any():
            return prepared.rows
        known = SampleRows.of(
            SampleRow(item.sample.key, item.sample.index, reason)
            for item, reason in zip(self._items, self._reasons, strict=True)
            if item.known is not None
        )
        places = np.where(is_known, len(prepared.rows) + np.cumsum(is_known), np.cumsum(~is_known)) - 1
        return SampleRows.concat([prepared.rows, known]).take(places)


_NOTHING_TO_SCORE = PreparedBatch(
    rows=SampleRows.of([]),
    pixel_values=torch.empty(0, 3, 0, 0, dtype=torch.uint8),
    input_ids=torch.empty(0, 0, dtype=torch.int64),
)
