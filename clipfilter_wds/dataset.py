"""Shards -> batches ready to score, decoded in DataLoader workers; each carries its own position."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from clipfilter_wds.captions import Tokens
from clipfilter_wds.preprocess import ClipPreprocess, ImageView, OpenPair, UnusableError, decode_sample, read_uid
from clipfilter_wds.samples import SampleLayout
from clipfilter_wds.shards import expand_shards
from clipfilter_wds.stream import (
    LookUp,
    PartEnd,
    Position,
    ShardFailure,
    StreamOrder,
    StreamSample,
    know_nothing,
    read_stream,
)
from clipfilter_wds.types import DropReason, Sample
from clipfilter_wds.whereabouts import Trail, Whereabouts
from clipfilter_wds.world import World

ImageTransform = Callable[[Image.Image], Any]
TextTransform = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What is known of one sample beside its pixels and tokens; a row of the score table, but for the score."""

    key: str
    index: int
    reason: DropReason | None = None
    num_tokens: int = 0
    truncated: bool = False
    width: int = 0
    height: int = 0
    uid: bytes | None = None


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


class ClipWebDataset(IterableDataset[StreamBatch]):
    """Streams image-caption pairs from shards: read, decoded, prepared for CLIP and for training, not yet filtered.

    Give it to a :class:`~clipfilter_wds.loader.ClipFilterLoader`, which runs it in workers and drops what CLIP finds
    mispaired.

    Args:
        shards: Whatever :func:`~clipfilter_wds.shards.expand_shards` takes.
        preprocess: The scorer's ``preprocess``. None for a loader that takes all scores from a table.
        image_transform: RGB image -> the training view of it. The image is the one that CLIP's view was made from, so
            it is decoded once, except that one which ``fast_decode`` reduced is decoded again in full. None gives
            CLIP's own view, uint8 ``[3, H, W]``.
        text_transform: Caption -> its training view; None gives the caption. Of an image with several,
            the list of them.
        shuffle: Shuffle the shards, and the samples within windows of this many; 0 keeps the order.
        seed: Of the order.
        layout: Which members are image and caption.
        allow_pipe: Read ``pipe:`` URLs, which run shell commands.
        world: This rank among all; None lets the loader find out, and is a world of one where there is no loader.

    Raises:
        ValueError: When no shard matches, or ``shuffle`` is negative.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        preprocess: ClipPreprocess | None = None,
        *,
        image_transform: ImageTransform | None = None,
        text_transform: TextTransform | None = None,
        shuffle: int = 0,
        seed: int = 0,
        layout: SampleLayout | None = None,
        allow_pipe: bool = False,
        world: World | None = None,
    ) -> None:
        if shuffle < 0:
            raise ValueError(f"shuffle is {shuffle}; it is the number of samples that are shuffled together, or 0")
        self.urls = expand_shards(shards, allow_pipe=allow_pipe)
        self.preprocess = preprocess
        self.image_transform = image_transform
        self.text_transform = text_transform
        self.shuffle = shuffle
        self.seed = seed
        self.layout = layout or SampleLayout()
        self.allow_pipe = allow_pipe
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Order shards and samples for this epoch from the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[StreamBatch]:
        """One epoch, in batches of 64 samples (for use without a loader).

        Raises:
            ValueError: Without ``preprocess``.
        """
        info = get_worker_info()
        # Not looked up: this runs in workers, whose environment may name a world and no rank.
        world, num_workers = self.world or World(), info.num_workers if info else 1
        start = [Position(epoch=self.epoch)] * num_workers
        return iter(
            StreamWorker(self, world=world, num_workers=num_workers, batch_size=64, epoch=self.epoch, start=start)
        )


class StreamWorker(IterableDataset[StreamBatch]):
    """A :class:`ClipWebDataset` with all that a worker must be told: it never looks anything up itself.

    Args:
        dataset: What to read.
        world: This rank among all.
        num_workers: Workers of this rank.
        batch_size: Samples per batch, unusable ones included.
        epoch: The epoch to read.
        start: Per worker, its position; in a later epoch for a worker that has nothing left in this one.
        first: The worker whose batch comes first. DataLoader always begins with its worker 0, so that one is it.
        endless: Go on with the next epoch for ever.
        look_up: What is known of a shard before it is read. Samples known to be dropped are not read.
        view: How images are decoded; None for that of the dataset's ``preprocess``.
        whereabouts: Where workers leave what they are at.

    Raises:
        ValueError: When there is neither ``view`` nor ``preprocess``.
    """

    def __init__(
        self,
        dataset: ClipWebDataset,
        *,
        world: World,
        num_workers: int,
        batch_size: int,
        epoch: int,
        start: Sequence[Position],
        first: int = 0,
        endless: bool = False,
        look_up: LookUp = know_nothing,
        view: ImageView | None = None,
        whereabouts: Whereabouts | None = None,
    ) -> None:
        if view is None:
            if dataset.preprocess is None:
                raise ValueError("the dataset has no preprocess: give it the scorer's, or its loader a ScoreTable")
            view = dataset.preprocess.view
        self.dataset = dataset
        self.order = StreamOrder(
            urls=dataset.urls, shuffle=dataset.shuffle, seed=dataset.seed, world=world, num_workers=num_workers
        )
        self.batch_size = batch_size
        self.epoch = epoch
        self.start = list(start)
        self.first = first
        self.endless = endless
        self.look_up = look_up
        self.view = view
        self.whereabouts = whereabouts or Whereabouts(dataset.urls, num_workers)

    def __iter__(self) -> Iterator[StreamBatch]:
        """This worker's batches. Iterated again, as persistent workers are, they are those of the next epoch."""
        info = get_worker_info()
        worker = ((info.id if info else 0) + self.first) % self.order.num_workers
        position, epoch = self.start[worker], self.epoch
        self.epoch, self.start, self.first = epoch + 1, [Position(epoch=epoch + 1)] * self.order.num_workers, 0
        return self._batches(worker, position, epoch)

    def _batches(self, worker: int, position: Position, epoch: int) -> Iterator[StreamBatch]:
        # A worker whose position is in the next epoch already has nothing more to give in this one.
        while self.endless or position.epoch == epoch:
            yield from self._epoch(worker, position)
            position = Position(epoch=position.epoch + 1)

    def _epoch(self, worker: int, start: Position) -> Iterator[StreamBatch]:
        trail = self.whereabouts.trail()
        builder = _BatchBuilder(worker, self.dataset, self.view, trail)
        layout, allow_pipe = self.dataset.layout, self.dataset.allow_pipe
        items = read_stream(self.order, worker, start, layout, trail, look_up=self.look_up, allow_pipe=allow_pipe)
        after = start
        for item in items:
            if isinstance(item, PartEnd):
                builder.ends.append(item)
                continue
            after = item.after
            if isinstance(item, ShardFailure):
                builder.failures.append((item.url, item.why))
            else:
                builder.add(item)
            if len(builder) == self.batch_size:
                yield builder.build(after)
        # The epoch's last batch says that the epoch is over, even when it holds no sample.
        yield builder.build(Position(epoch=after.epoch + 1))


class _BatchBuilder:
    """Gathers samples until they are made a batch of."""

    def __init__(self, worker: int, dataset: ClipWebDataset, view: ImageView, trail: Trail) -> None:
        self._worker, self._dataset, self._view, self._trail = worker, dataset, view, trail
        #: How images are decoded for training's own transform, which gets none at a reduced size.
        self._whole = replace(view, fast_decode=False)
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
                with self._trail.at(item.url, item.sample.index):
                    self._decode(item)
            except UnusableError as unusable:
                reason, keep = unusable.reason, False
                if item.known is None:
                    self._fresh.append((item.sample, reason))
        self._items.append(item)
        self._reasons.append(reason)
        self._has_views.append(keep)

    def _decode(self, item: StreamSample) -> None:
        dataset, sample, transform = self._dataset, item.sample, self._dataset.image_transform
        only_training = transform is not None and item.known is not None
        rgb, captions = decode_sample(sample, dataset.layout, self._whole if only_training else self._view)
        whole = rgb
        if transform is not None and rgb.scale > 1:
            whole, _ = decode_sample(sample, dataset.layout, self._whole)
        view = None
        if item.known is None:
            if dataset.preprocess is None:
                raise ValueError("the dataset has no preprocess, so it can't be scored")
            pair = dataset.preprocess.prepare(rgb, captions)
            self._fresh.append((sample, pair))
            view = pair.pixels
        if transform is not None:
            view = transform(whole.image)
        self._images.append(self._view(rgb) if view is None else view)
        self._texts.append(captions[0] if len(captions) == 1 else captions)

    def build(self, after: Position) -> StreamBatch:
        """Make a batch of what was added, and begin the next one."""
        dataset = self._dataset
        fresh = [opened for _, opened in self._fresh if isinstance(opened, OpenPair)]
        pixel_values, tokens = dataset.preprocess.collate(fresh) if dataset.preprocess else _NOTHING_TO_SCORE
        # The very tensor, where all is to be scored and CLIP's views are what training gets, so that it is sent once.
        same = dataset.image_transform is None and len(fresh) == len(self._images)
        texts = self._texts if dataset.text_transform is None else list(map(dataset.text_transform, self._texts))
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
                "text": texts if dataset.text_transform is None else _collate(texts),
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


def sample_rows(samples: Sequence[tuple[Sample, OpenPair | DropReason]], tokens: Tokens) -> list[SampleRow]:
    """The rows of samples, the usable ones of which have these tokens."""
    counts = zip(tokens.num_tokens, tokens.truncated, strict=True)
    return [
        SampleRow(sample.key, sample.index, None, *next(counts), opened.width, opened.height, read_uid(sample))
        if isinstance(opened, OpenPair)
        else SampleRow(sample.key, sample.index, opened, uid=read_uid(sample))
        for sample, opened in samples
    ]
