"""Streams a worker's samples in the order of training, from any position on."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.open import OpenShard
from clipfilter_wds.shards.samples import SampleLayout, read_part, read_samples
from clipfilter_wds.shards.split import ShardPart, split_by_worker
from clipfilter_wds.training.precomputed import PrecomputedScore, PrecomputedScores, ScoreLookup, no_scores
from clipfilter_wds.types import Sample, ShardEnd, ShardError
from clipfilter_wds.workers.crashes import WorkerTracker
from clipfilter_wds.world import World


@dataclass(frozen=True, slots=True)
class Position:
    """Where a worker is in its stream; all that it takes to continue there.

    Samples are read in windows and shuffled within each, so a position is where its window begins and how many of the
    window's samples were handed out. Resuming reads at most one window again, however far the epoch is.

    Attributes:
        epoch: Counts from 0.
        shard: Index into the worker's shards of this epoch.
        index: Index in that shard from which on the window's samples come.
        offset: Samples of the window that were handed out.
    """

    epoch: int = 0
    shard: int = 0
    index: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class StreamSample:
    """A sample, its shard's URL and size as stored, the position after it, and what is known of its score.

    A sample that is known to be dropped has no members.
    """

    url: str
    num_bytes: int
    sample: Sample
    after: Position
    known: PrecomputedScore | None = None


@dataclass(frozen=True, slots=True)
class PartEnd:
    """All of a worker's samples of a shard have been given, and what was found at the shard's end."""

    url: str
    end: ShardEnd


@dataclass(frozen=True, slots=True)
class ShardFailure:
    """A shard, or the rest of one, that can't be used, why, and the position after it."""

    url: str
    why: str
    after: Position


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """Decides the order of the stream, as a pure function of these settings, the epoch and the worker.

    Attributes:
        urls: All shards, those of other ranks and workers included.
        shuffle: Samples per window within which samples are shuffled; 0 keeps shards and samples in order.
        seed: Of the order of shards and samples.
        world: This rank among all ranks.
        num_workers: Workers per rank.
    """

    urls: Sequence[str]
    shuffle: int
    seed: int
    world: World
    num_workers: int

    def parts(self, epoch: int, worker: int) -> list[ShardPart]:
        """What a worker reads in an epoch. Ranks take turns, so that over the epochs each reads everything."""
        urls = list(self.urls)
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(urls)
        turn = (self.world.rank + epoch) % self.world.world_size
        return split_by_worker(urls, worker * self.world.world_size + turn, self.num_workers * self.world.world_size)

    def permutation(self, worker: int, window: Position, num_samples: int) -> list[int]:
        """The order of a window's samples."""
        order = list(range(num_samples))
        if self.shuffle:
            where = f"{window.epoch}/{self.world.rank}/{worker}/{window.shard}/{window.index}"
            random.Random(f"{self.seed}/{where}").shuffle(order)
        return order


def read_stream(
    order: StreamOrder,
    worker: int,
    start: Position,
    layout: SampleLayout,
    worker_tracker: WorkerTracker,
    *,
    lookup: ScoreLookup = no_scores,
    allow_pipe: bool = False,
) -> Iterator[StreamSample | ShardFailure | PartEnd]:
    """One epoch of a worker's samples, from a position on.

    Every sample of the worker's shards comes exactly once, unusable ones included, and some time after the last of a
    shard its :class:`PartEnd`. A shard that can't be used is a :class:`ShardFailure`, and the stream continues with the
    next. The order does not depend on what is known beforehand.

    Raises:
        ValueError: When a shard is not the one of which something is known.
    """
    window = replace(start, offset=0)
    skip = start.offset
    raw = _read_parts(order.parts(start.epoch, worker), window, layout, worker_tracker, lookup, allow_pipe)
    # Without shuffling a window is one sample, so that nothing is read ahead or again.
    ends: list[PartEnd] = []
    samples = _without_ends(raw, ends)
    while items := list(islice(samples, max(1, order.shuffle))):
        following = items[-1].after
        for offset, place in enumerate(order.permutation(worker, window, len(items)), start=1):
            if offset > skip:
                after = following if offset == len(items) else replace(window, offset=offset)
                yield replace(items[place], after=after)
        window, skip = following, 0
        yield from ends
        ends.clear()
    yield from ends


def _without_ends(
    items: Iterable[StreamSample | ShardFailure | PartEnd], ends: list[PartEnd]
) -> Iterator[StreamSample | ShardFailure]:
    """Put the ends aside, which are no part of a window."""
    for item in items:
        if isinstance(item, PartEnd):
            ends.append(item)
        else:
            yield item


def _read_parts(
    parts: Sequence[ShardPart],
    start: Position,
    layout: SampleLayout,
    worker_tracker: WorkerTracker,
    lookup: ScoreLookup,
    allow_pipe: bool,
) -> Iterator[StreamSample | ShardFailure | PartEnd]:
    """The samples of a worker's shards as they lie there."""
    for number in range(start.shard, len(parts)):
        part = parts[number]
        begin = start if number == start.shard else Position(start.epoch, number)
        try:
            worker_tracker.begin_shard(part.url)
            read = partial(_read_open, part, begin, layout, worker_tracker, lookup)
            for item in read_part(part, read, allow_pipe=allow_pipe):
                yield PartEnd(part.url, item) if isinstance(item, ShardEnd) else item
        except ShardError as error:
            yield ShardFailure(part.url, str(error), Position(start.epoch, number + 1))


def _read_open(
    part: ShardPart,
    start: Position,
    layout: SampleLayout,
    worker_tracker: WorkerTracker,
    lookup: ScoreLookup,
    shard: OpenShard,
) -> Iterator[StreamSample | ShardEnd]:
    """A worker's share of an open shard, from a position on, and the shard's end.

    What is known to be dropped is not read, but has its place.
    """
    known = lookup(part.url)

    def is_mine(index: int) -> bool:
        return index >= start.index and index % part.num_parts == part.part

    def wanted(index: int) -> bool:
        return is_mine(index) and (index not in known.samples or known.samples[index].keep)

    def stream_sample(sample: Sample) -> StreamSample:
        after = Position(start.epoch, start.shard, sample.index + 1)
        checked = worker_tracker.checked(part.url, sample)
        return StreamSample(part.url, shard.num_bytes, checked, after, known.samples.get(sample.index))

    place = start.index
    for item in read_samples(shard, layout, wanted=wanted, pair_only=True):
        _check_is_known(part.url, item, known)
        until = item.num_samples if isinstance(item, ShardEnd) else item.index
        for index in filter(is_mine, range(place, until)):
            yield stream_sample(Sample(key=known.samples[index].key, index=index))
        yield item if isinstance(item, ShardEnd) else stream_sample(item)
        place = until + 1


def _check_is_known(url: str, item: Sample | ShardEnd, known: PrecomputedScores) -> None:
    """Check that a shard is the one whose scores are known.

    Raises:
        ValueError: When it is not.
    """
    if isinstance(item, ShardEnd):
        here, there = f"{item.num_samples} samples", f"{known.num_samples} samples"
        is_same = known.num_samples in (None, item.num_samples)
    else:
        expected = known.samples.get(item.index)
        here, there = f"sample {item.index} is {item.key!r}", f"it is {expected.key!r}" if expected else "there is none"
        is_same = expected.key == item.key if expected else known.num_samples is None
    if not is_same:
        raise ValueError(f"{public_url(url)} is not the shard that was scored: {here} here, {there} among the scores")
