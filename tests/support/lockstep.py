"""Runs all ranks and workers of a training job in one process, batch by batch in step, from scores that are known."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.batches import StreamBatch
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset, StreamWorker
from clipfilter_wds.training.packer import Packed, Packer
from clipfilter_wds.training.precomputed import PrecomputedScore, PrecomputedScores
from clipfilter_wds.training.resume import check_streams, share_out
from clipfilter_wds.training.scoring import score_stream
from clipfilter_wds.training.state import LoaderState, Progress
from clipfilter_wds.training.stream import Position, StreamOrder, StreamProgress, StreamSample, read_stream
from clipfilter_wds.training.topology import Topology
from clipfilter_wds.workers.crashes import CrashTracker
from clipfilter_wds.world import World
from tests.support.images import VIEW

SCORE_BATCH_SIZE = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job, whoever runs it.

    Attributes:
        dataset: What it reads.
        config: Its loader's.
        kept: Keys of the samples that it keeps.
    """

    dataset: ClipWebDataset
    config: LoaderConfig
    kept: frozenset[str]

    def lookup(self, url: str) -> PrecomputedScores:
        """All scores of a shard."""
        order = StreamOrder(urls=[url], shuffle=0, seed=0, num_streams=1)
        keys = [sample.sample.key for sample in self._read(order, stream=0, epoch=0)]
        samples = {
            index: PrecomputedScore(key, float(key in self.kept), None, key in self.kept)
            for index, key in enumerate(keys)
        }
        return PrecomputedScores(samples=samples, num_samples=len(keys))

    def keys_before(self, topology: Topology, stream: int, progress: StreamProgress) -> list[str]:
        """The kept keys that a stream has given when it is so far, in order."""
        settings = self.dataset
        order = StreamOrder(
            urls=settings.urls,
            shuffle=settings.shuffle,
            seed=settings.seed,
            num_streams=topology.num_streams,
            num_groups=topology.num_groups,
        )
        epochs = [list(self._read(order, stream, epoch)) for epoch in range(progress.position.epoch + 3)]
        places = [sample.after for epoch in epochs for sample in epoch]
        beginnings = [sum(map(len, epochs[:number])) for number in range(len(epochs))]
        position = progress.position
        if position.shard == position.index == position.offset == 0:
            num_read = beginnings[position.epoch]
        else:
            num_read = places.index(position) + 1
        keys = [sample.sample.key for epoch in epochs for sample in epoch]
        rest = [key for key in keys[num_read:] if key in self.kept]
        return [key for key in keys[:num_read] if key in self.kept] + rest[: progress.given]

    def _read(self, order: StreamOrder, stream: int, epoch: int) -> Iterator[StreamSample]:
        tracker = CrashTracker(order.urls, 0).for_worker()
        for item in read_stream(order, stream, Position(epoch=epoch), SampleLayout(), tracker):
            if isinstance(item, StreamSample):
                yield item


@dataclass
class Rank:
    """One rank of a job, from a state on; ``given`` are the keys of its batches."""

    job: Job
    state: LoaderState
    given: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        packer = Packer(self.job.config, self.state, has_scores=True, kind=COSINES, layout=SampleLayout())
        self._packed = packer.pack(score_stream(None, None, self._batches()))
        self._waiting: Packed | None = None

    def _batches(self) -> Iterator[StreamBatch]:
        """Those of the workers in turn, as a DataLoader takes them."""
        progress, job = self.state.progress, self.job
        stream = StreamWorker(
            job.dataset,
            progress.topology,
            progress.streams,
            batch_size=SCORE_BATCH_SIZE,
            epoch=self.state.epoch,
            lookup=job.lookup,
            view=VIEW,
        )
        num_workers = progress.topology.num_workers
        last_epoch = None if job.config.end == "repeat" else self.state.epoch
        workers = [
            stream.read((progress.next_worker + number) % num_workers, progress.streams, last_epoch)
            for number in range(num_workers)
        ]
        while workers:
            for worker in [*workers]:
                batch = next(worker, None)
                if batch is None:
                    workers.remove(worker)
                else:
                    yield batch

    @property
    def has_batch(self) -> bool:
        """Whether there is another batch."""
        if self._waiting is None:
            self._waiting = next(self._packed)
        return self._waiting.batch is not None

    def step(self) -> None:
        """Take the next batch."""
        assert self.has_batch
        packed, self._waiting = self._waiting, None
        assert packed is not None
        assert packed.batch is not None
        self.state = packed.state
        self.given.append(packed.batch["__key__"])


def begin(job: Job, world_size: int, num_workers: int, states: Sequence[Mapping[str, Any]] = ()) -> list[Rank]:
    """All ranks of a job, at its beginning or from the states of all ranks that ran it before."""
    ranks = []
    for rank in range(world_size):
        topology = job.dataset.topology(
            World(rank=rank, world_size=world_size), max(1, num_workers), job.config.num_streams
        )
        state = LoaderState(progress=Progress.start(topology, 0), epoch=0)
        if states:
            state = share_out([LoaderState.from_json(one) for one in states], topology)
            check_streams(state, job.config.end)
        ranks.append(Rank(job, state))
    return ranks


def run(ranks: Sequence[Rank], num_steps: int | None = None) -> None:
    """So many steps of all ranks, fewer where the epoch ends; None to the end of the epoch."""
    while num_steps != 0 and all(rank.has_batch for rank in ranks):
        for rank in ranks:
            rank.step()
        num_steps = None if num_steps is None else num_steps - 1


def saved(ranks: Sequence[Rank]) -> list[dict[str, Any]]:
    """The states of all ranks, as files hold them."""
    states: list[dict[str, Any]] = json.loads(json.dumps([rank.state.to_json() for rank in ranks]))
    return states


def keys_of(ranks: Sequence[Rank]) -> list[str]:
    """All keys that were given."""
    return [key for rank in ranks for batch in rank.given for key in batch]
