"""Shards -> batches ready to score, decoded in DataLoader workers; each carries its own position."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from clipfilter_wds.captions import Tokens
from clipfilter_wds.preprocess import ClipPreprocess, OpenPair, UnusableError, read_uid
from clipfilter_wds.samples import SampleLayout
from clipfilter_wds.shards import expand_shards
from clipfilter_wds.stream import Position, ShardFailure, StreamOrder, read_stream
from clipfilter_wds.types import DropReason, Sample
from clipfilter_wds.world import World

T = TypeVar("T")
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
        pixel_values: uint8 ``[N, 3, H, W]``, CLIP's views of the rows without a ``reason``.
        input_ids: int64 ``[N, L]``, likewise.
        views: What training gets of these N samples, collated: ``image`` and ``text``.
        failures: Shards that could not be used, with the reason.
    """

    worker: int
    after: Position
    urls: list[str]
    rows: list[SampleRow]
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    views: dict[str, Any]
    failures: list[tuple[str, str]]


class ClipWebDataset(IterableDataset[StreamBatch]):
    """Streams image-caption pairs from shards: read, decoded, prepared for CLIP and for training, not yet filtered.

    Give it to a :class:`~clipfilter_wds.loader.ClipFilterLoader`, which runs it in workers and drops what CLIP finds
    mispaired.

    Args:
        shards: Whatever :func:`~clipfilter_wds.shards.expand_shards` takes.
        preprocess: The scorer's ``preprocess``.
        image_transform: RGB image -> the training view of it. The image is the one that CLIP's view was made from, so
            it is decoded once. None gives CLIP's own view, uint8 ``[3, H, W]``.
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
        preprocess: ClipPreprocess,
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
        """One epoch, in batches of 64 samples (for use without a loader)."""
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
    ) -> None:
        self.dataset = dataset
        self.order = StreamOrder(
            urls=dataset.urls, shuffle=dataset.shuffle, seed=dataset.seed, world=world, num_workers=num_workers
        )
        self.batch_size = batch_size
        self.epoch = epoch
        self.start = list(start)
        self.first = first
        self.endless = endless

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
        builder = _BatchBuilder(worker, self.dataset)
        items = read_stream(self.order, worker, start, self.dataset.layout, allow_pipe=self.dataset.allow_pipe)
        after = start
        for item in items:
            after = item.after
            if isinstance(item, ShardFailure):
                builder.failures.append((item.url, item.why))
            else:
                builder.add(item.url, item.sample)
            if len(builder) == self.batch_size:
                yield builder.build(after)
        # The epoch's last batch says that the epoch is over, even when it holds no sample.
        yield builder.build(Position(epoch=after.epoch + 1))


class _BatchBuilder:
    """Gathers samples until they are made a batch of."""

    def __init__(self, worker: int, dataset: ClipWebDataset) -> None:
        self._worker, self._dataset = worker, dataset
        self._clear()

    def _clear(self) -> None:
        self._urls: list[str] = []
        self._samples: list[tuple[Sample, OpenPair | DropReason]] = []
        self._images: list[Any] = []
        self.failures: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, url: str, sample: Sample) -> None:
        dataset = self._dataset
        self._urls.append(url)
        try:
            image, captions = dataset.preprocess.decode_sample(sample, dataset.layout)
        except UnusableError as unusable:
            self._samples.append((sample, unusable.reason))
            return
        self._samples.append((sample, dataset.preprocess.prepare(image, captions)))
        if dataset.image_transform is not None:
            self._images.append(dataset.image_transform(image))

    def build(self, after: Position) -> StreamBatch:
        """Make a batch of what was added, and begin the next one."""
        dataset = self._dataset
        usable = [opened for _, opened in self._samples if isinstance(opened, OpenPair)]
        pixel_values, tokens = dataset.preprocess.collate(usable)
        texts: list[Any] = [pair.captions[0] if len(pair.captions) == 1 else pair.captions for pair in usable]
        if dataset.text_transform is not None:
            texts = [dataset.text_transform(text) for text in texts]
        views = {
            "image": pixel_values if dataset.image_transform is None else _collate(self._images),
            "text": texts if dataset.text_transform is None else _collate(texts),
        }
        batch = StreamBatch(
            worker=self._worker,
            after=after,
            urls=self._urls,
            rows=sample_rows(self._samples, tokens),
            pixel_values=pixel_values,
            input_ids=tokens.input_ids,
            views=views,
            failures=self.failures,
        )
        self._clear()
        return batch


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


def worker_loader(
    dataset: Dataset[T],
    *,
    num_workers: int,
    pin_memory: bool = False,
    requests: Iterable[Any] | None = None,
    in_order: bool = True,
    persistent_workers: bool = False,
    multiprocessing_context: str | None = None,
) -> DataLoader[T]:
    """A DataLoader that hands the dataset's batches on as they are, in ``num_workers`` processes (0: in this one).

    Args:
        dataset: Yields batches; or makes one of whatever it is asked for, when there are ``requests``.
        num_workers: Processes that run the dataset.
        pin_memory: Put tensors in page-locked memory.
        requests: Drawn in this process, a few ahead of the batches.
        persistent_workers: Keep the processes when the loader is iterated again.
        in_order: Take the workers' batches in turn, or in the order of the requests; else as they come.
        multiprocessing_context: How processes are started: ``fork``, ``spawn``, ``forkserver``, None for the default.
    """
    return DataLoader(
        dataset,
        sampler=requests,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker if num_workers else None,
        persistent_workers=persistent_workers,
        prefetch_factor=2 if num_workers else None,
        in_order=in_order,
        multiprocessing_context=multiprocessing_context if num_workers else None,
    )


def _init_worker(worker: int) -> None:
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # a worker is one core's worth of work
    # Ctrl-C goes to every process of a terminal; only the parent answers it, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
