"""Reads shards in blocks of samples that are ready to score, the same ones however the work is shared out."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from clipfilter_wds.preprocess.batch import BatchBuilder, PreparedBatch
from clipfilter_wds.preprocess.clip import ClipPreprocess, ImageOut, OpenPair
from clipfilter_wds.preprocess.json_columns import JsonColumns, JsonValue
from clipfilter_wds.preprocess.members import read_uid
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.shards.samples import SampleLayout, read_part, read_samples
from clipfilter_wds.shards.split import ShardPart, split_by_worker
from clipfilter_wds.types import DropReason, Sample, ShardEnd, ShardError, UnusableError
from clipfilter_wds.workers.crashes import CrashTracker, WorkerTracker
from clipfilter_wds.workers.pool import worker_loader
from clipfilter_wds.workers.restart import restarting
from clipfilter_wds.workers.transport import Lent, lent, slot_buffer


@dataclass(frozen=True, kw_only=True)
class Block:
    """A run of consecutive samples of one shard.

    Which samples share a block depends on the shard and the batch size only, not on workers, other shards or where a
    run began, so that a resumed run computes the very same floats.

    Attributes:
        part: The worker's share of the shard that the samples come from.
        prepared: The samples.
        columns: Per sample, the values of ``json_columns``.
        end: Set on the part's last block, which may hold no samples.
        error: Set instead of ``end`` when the shard can't be used; the shard's earlier blocks don't count then.
    """

    part: ShardPart
    prepared: PreparedBatch
    columns: Sequence[tuple[JsonValue, ...]] = ()
    end: ShardEnd | None = None
    error: str | None = None


@dataclass
class BlockProgress:
    """How much of each part of a shard has come: its first blocks, or all of it."""

    num_blocks: Counter[ShardPart] = field(default_factory=Counter)
    ended: set[ShardPart] = field(default_factory=set)

    def add(self, block: Block) -> None:
        """Count a block."""
        if block.end is None and block.error is None:
            self.num_blocks[block.part] += 1
        else:
            self.ended.add(block.part)
            self.num_blocks.pop(block.part, None)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockDataset(IterableDataset[Block]):
    """Streams shards as :class:`Block` s: read, decoded, resized and tokenized, but not yet scored.

    Attributes:
        urls: The shards.
        preprocess: The scorer's ``preprocess``.
        batch_size: Samples per block; a shard's last block may hold fewer.
        layout: Which members are image and caption.
        json_columns: Fields of the json member to read, None for none.
        subset: Samples that it does not list are not decoded; they have the reason ``not_in_subset``.
        first_samples: Of these shards, how many first samples are decoded; the others have that reason too.
        allow_pipe: Read ``pipe:`` URLs, which run shell commands.
        interleaved: See ``BatchBuilder``.
        tracker: Workers report to it which sample they are at.
        progress: What has come of an earlier iteration, and is not read again.

    Raises:
        ValueError: When ``batch_size`` is less than 1.
    """

    urls: Sequence[str]
    preprocess: ClipPreprocess
    batch_size: int = 64
    layout: SampleLayout = field(default_factory=SampleLayout)
    json_columns: JsonColumns | None = None
    subset: Subset | None = None
    first_samples: Mapping[str, int] = field(default_factory=dict)
    allow_pipe: bool = False
    interleaved: bool = False
    tracker: CrashTracker | None = None
    progress: BlockProgress = field(default_factory=BlockProgress)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")

    def __iter__(self) -> Iterator[Block]:
        """Yield this worker's share; the workers of one DataLoader together yield every sample exactly once."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        worker_tracker = (self.tracker or CrashTracker(self.urls, 0)).for_worker()
        for part in split_by_worker(self.urls, worker, num_workers):
            if part not in self.progress.ended:
                yield from self._read_blocks(part, worker_tracker)

    def _read_blocks(self, part: ShardPart, worker_tracker: WorkerTracker) -> Iterator[Block]:
        num_done = self.progress.num_blocks[part]

        def wanted(index: int) -> bool:
            turn, whose = divmod(index // self.batch_size, part.num_parts)
            return whose == part.part and turn >= num_done

        read = partial(read_samples, layout=self.layout, wanted=wanted, pair_only=True)
        builder = BatchBuilder(self.preprocess, self.batch_size, slot_buffer, interleaved=self.interleaved)
        columns: list[tuple[JsonValue, ...]] = []
        try:
            worker_tracker.begin_shard(part.url)
            for item in read_part(part, read, allow_pipe=self.allow_pipe):
                if isinstance(item, ShardEnd):
                    yield Block(part=part, prepared=builder.build(), columns=columns, end=item)
                    continue
                with worker_tracker.at(part.url, item.index):
                    self._add(worker_tracker.checked(part.url, item), builder, self.first_samples.get(part.url))
                    if self.json_columns is not None:
                        columns.append(self.json_columns.read(item))
                if len(builder) == self.batch_size:
                    yield Block(part=part, prepared=builder.build(), columns=columns)
                    columns = []
        except ShardError as error:
            yield Block(part=part, prepared=builder.build(), error=str(error))

    def _add(self, sample: Sample, builder: BatchBuilder, num_first: int | None) -> None:
        uid = read_uid(sample)

        def open_pair(out: ImageOut) -> OpenPair:
            if num_first is not None and sample.index >= num_first:
                raise UnusableError(DropReason.NOT_IN_SUBSET)
            if sample.problem is None and self.subset is not None and not self.subset.holds([sample.key], [uid])[0]:
                raise UnusableError(DropReason.NOT_IN_SUBSET)
            return self.preprocess.open_sample(sample, self.layout, out)

        builder.add(sample.key, sample.index, open_pair, uid=uid)


def read_blocks(
    dataset: BlockDataset, *, num_workers: int, worker_timeout: float = 0.0, lend: bool = False
) -> Generator[Lent[Block]]:
    """A dataset's blocks, from worker processes, in any order. A sample that kills two of them is ``decoder_crash``.

    Args:
        dataset: What to read.
        num_workers: Processes that decode; 0: this one, which a sample can kill.
        worker_timeout: Seconds that one sample may take before its worker is killed; 0 is for ever.
        lend: Leave them in the workers' memory until they are released; see ``worker_loader``.

    Raises:
        WorkerDiedError: When workers die at once, or one after another with no block in between.
    """
    progress = BlockProgress()

    def start(tracker: CrashTracker) -> Iterable[Any]:
        return worker_loader(
            replace(dataset, tracker=tracker, progress=progress),
            num_workers=num_workers,
            lend=lend,
            batch_bytes=dataset.batch_size * dataset.preprocess.view_bytes(interleaved=dataset.interleaved),
            in_order=False,
            tracker=tracker,
        )

    started = restarting(start, dataset.urls, num_workers=num_workers, worker_timeout=worker_timeout)
    with closing(started) as blocks:
        for block in map(lent, blocks):
            progress.add(block.item)
            yield block
