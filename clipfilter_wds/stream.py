"""A worker's samples in the order of training, from any position: shards shuffled, shared out, samples shuffled."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from clipfilter_wds.samples import SampleLayout, read_samples
from clipfilter_wds.shards import ShardPart, open_shard, split_by_worker
from clipfilter_wds.types import Sample, ShardEnd, ShardError
from clipfilter_wds.world import World


@dataclass(frozen=True, slots=True)
class Position:
    """Where a worker is in its stream; all that it takes to go on from there.

    Samples are read in windows and shuffled within each, so a position is where its window begins and how many of the
    window's samples were handed out. Going on reads at most one window again, however far the epoch is.

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
    """A sample with its shard's URL, and the position after it."""

    url: str
    sample: Sample
    after: Position


@dataclass(frozen=True, slots=True)
class ShardFailure:
    """A shard, or the rest of one, that can't be used, why, and the position after it."""

    url: str
    why: str
    after: Position


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """The order of the stream: a pure function of this, the epoch and the worker.

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
    order: StreamOrder, worker: int, start: Position, layout: SampleLayout, *, allow_pipe: bool = False
) -> Iterator[StreamSample | ShardFailure]:
    """One epoch of a worker's samples, from a position on.

    Every sample of the worker's shards comes exactly once, unusable ones included. A shard that can't be used is a
    :class:`ShardFailure`, and the stream goes on with the next.
    """
    window = replace(start, offset=0)
    skip = start.offset
    raw = _read_parts(order.parts(start.epoch, worker), window, layout, allow_pipe)
    # Without shuffling a window is one sample, so that nothing is read ahead or again.
    while items := list(islice(raw, max(1, order.shuffle))):
        following = items[-1].after
        for offset, place in enumerate(order.permutation(worker, window, len(items)), start=1):
            if offset > skip:
                after = following if offset == len(items) else replace(window, offset=offset)
                yield replace(items[place], after=after)
        window, skip = following, 0


def _read_parts(
    parts: Sequence[ShardPart], start: Position, layout: SampleLayout, allow_pipe: bool
) -> Iterator[StreamSample | ShardFailure]:
    """The samples of a worker's shards as they lie there."""
    for number in range(start.shard, len(parts)):
        part = parts[number]
        first = start.index if number == start.shard else 0

        def wanted(index: int, part: ShardPart = part, first: int = first) -> bool:
            return index >= first and index % part.num_parts == part.part

        try:
            with open_shard(part.url, allow_pipe=allow_pipe) as shard:
                for item in read_samples(shard, layout, wanted=wanted, pair_only=True):
                    if not isinstance(item, ShardEnd):
                        after = Position(start.epoch, number, item.index + 1)
                        yield StreamSample(part.url, item, after)
        except ShardError as error:
            yield ShardFailure(part.url, str(error), Position(start.epoch, number + 1))
