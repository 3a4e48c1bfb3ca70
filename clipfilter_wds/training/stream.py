"""Streams samples in the order of training, from any position on."""

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
from clipfilter_wds.types import Sample, ShardEnd, ShardError, ShardIdentity
from clipfilter_wds.workers.crashes import WorkerTracker


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a stream; all that it takes to continue there.

    Samples are read in windows and shuffled within each, so a position is where its window begins and how many of the
    window's samples were handed out. Resuming reads at most one window again, however far the epoch is.

    Attributes:
        epoch: Counts from 0.
        shard: Index into the stream's shards of this epoch.
        index: Index in that shard from which on the window's samples come.
        offset: Samples of the window that were handed out.
    """

    epoch: int = 0
    shard: int = 0
    index: int = 0
    offset: int = 0

    @property
    def is_between_windows(self) -> bool:
        """Whether no window has been begun."""
        return self.offset == 0


@dataclass(frozen=True, slots=True)
class StreamProgress:
    """How far a stream is.

    Attributes:
        position: Where it continues.
        turns: How often it was its turn; see :class:`StreamOrder`.
        given: How many kept samples behind the position training was given already.
    """

    position: Position = Position()
    turns: int = 0
    given: int = 0


@dataclass(frozen=True, slots=True)
class StreamSample:
    """A sample, its shard's URL and identity, the position after it, and what is known of its score.

    A sample that is known to be dropped has no members.
    """

    url: str
    identity: ShardIdentity
    sample: Sample
    after: Position
    known: PrecomputedScore | None = None


@dataclass(frozen=True, slots=True)
class PartEnd:
    """All of a stream's samples of a shard have been given, and what was found at the shard's end."""

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
    """Decides the order of the samples, as a pure function of these settings, the epoch and the stream.

    An epoch is split into streams, whose number has nothing to do with that of ranks and workers, so that any of them
    can continue any stream. A worker that has several takes turns: next comes the stream with the fewest turns, of
    several the one with the lowest number. A turn is a window, or a batch where there is no shuffling.

    Attributes:
        urls: All shards.
        shuffle: Samples per window within which samples are shuffled; 0 keeps shards and samples in order.
        seed: Of the order of shards and samples.
        num_streams: Streams of an epoch.
        num_groups: Groups of streams that have the same work; see ``Topology``.
    """

    urls: Sequence[str]
    shuffle: int
    seed: int
    num_streams: int
    num_groups: int = 1

    def parts(self, epoch: int, stream: int) -> list[ShardPart]:
        """What a stream reads in an epoch."""
        urls = list(self.urls)
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(urls)
        turn = (stream + epoch) % self.num_streams if self.num_groups > 1 else stream
        if len(urls) < self.num_streams or self.num_streams % self.num_groups:
            return split_by_worker(urls, turn, self.num_streams)
        # Only groups share shards, since each of several streams reads all of a shard for its part of it.
        of_group = split_by_worker(urls, turn % self.num_groups, self.num_groups)
        return of_group[turn // self.num_groups :: self.num_streams // self.num_groups]

    def permutation(self, stream: int, window: Position, num_samples: int) -> list[int]:
        """The order of a window's samples."""
        order = list(range(num_samples))
        if self.shuffle:
            where = f"{window.epoch}/{stream}/{window.shard}/{window.index}"
            random.Random(f"{self.seed}/{where}").shuffle(order)
        return order


def read_stream(
    order: StreamOrder,
    stream: int,
    start: Position,
    layout: SampleLayout,
    worker_tracker: WorkerTracker,
    *,
    lookup: ScoreLookup = no_scores,
    allow_pipe: bool = False,
) -> Iterator[StreamSample | ShardFailure | PartEnd]:
    """One epoch of a stream, from a position on.

    Every sample of the stream's shards comes exactly once, unusable ones included, and some time after the last of a
    shard its :class:`PartEnd`. A shard that can't be used is a :class:`ShardFailure`, and the stream continues with the
    next. The order does not depend on what is known beforehand.

    Raises:
        ValueError: When a shard is not the one of which something is known.
    """
    window = replace(start, offset=0)
    skip = start.offset
    raw = _read_parts(order.parts(start.epoch, stream), window, layout, worker_tracker, lookup, allow_pipe)
    # Without shuffling a window is one sample, so that nothing is read ahead or again.
    ends: list[PartEnd] = []
    samples = _without_ends(raw, ends)
    while items := dict(enumerate(islice(samples, max(1, order.shuffle)))):
        num_items, following = len(items), items[len(items) - 1].after
        for offset, place in enumerate(order.permutation(stream, window, num_items), start=1):
            item = items.pop(place)  # so that a stream whose turn is over holds no samples
            if offset > skip:
                yield replace(item, after=following if offset == num_items else replace(window, offset=offset))
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
    """The samples of a stream's shards as they lie there."""
    for number in range(start.shard, len(parts)):
        part = parts[number]
        begin = start if number == start.shard else Position(start.epoch, number)
        try:
            worker_tracker.begin_shard(part.url)
            read = partial(_read_open, part, begin, layout, worker_tracker, lookup)
            for item in read_part(part, read, allow_pipe=allow_pipe):
                yield PartEnd(part.url, item) if isinstance(item, ShardEnd) else item
                worker_tracker.continue_shard(part.url)  # another stream's may have been read meanwhile
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
    """A stream's share of an open shard, from a position on, and the shard's end.

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
        return StreamSample(part.url, shard.identity, checked, after, known.samples.get(sample.index))

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
