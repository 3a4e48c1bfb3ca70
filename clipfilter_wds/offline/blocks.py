"""Shards -> blocks of samples ready to score, for runs whose bits must not depend on how the work was shared out."""

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from clipfilter_wds.preprocess.clip import ClipPreprocess, OpenPair, sample_rows
from clipfilter_wds.preprocess.members import read_uid
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.shards.split import ShardPart, split_by_worker
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.types import DropReason, Sample, SampleRow, ShardEnd, ShardError, UnusableError
from clipfilter_wds.workers.crashes import CrashTracker, Quarantine, WorkerDiedError, WorkerTracker
from clipfilter_wds.workers.pool import iterating, worker_loader

#: A worker sends smaller tensors through its pipe and larger ones in shared memory. To hand that over takes a dozen
#: system calls, and after each the receiver waits until the thread that writes shards lets go of the interpreter.
_SMALL_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Block:
    """A run of consecutive samples of one shard.

    Which samples share a batch depends on the shard and the batch size only, not on workers, other shards or where a
    run began, so that a run that was resumed computes the very same floats.

    Attributes:
        part: The worker's share of the shard that the samples come from.
        rows: Every sample of the run, usable or not, in order.
        pixel_values: uint8 ``[N, 3, H, W]``, one view per row without a ``reason``, in the order of the rows.
        input_ids: int64 ``[N, L]``, likewise.
        end: Set on the part's last batch, which may hold no samples.
        error: Set instead of ``end`` when the shard can't be used; the shard's earlier batches don't count then.
    """

    part: ShardPart
    rows: list[SampleRow]
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    end: ShardEnd | None = None
    error: str | None = None

    def pin_memory(self) -> "Block":
        """The batch with its tensors in page-locked memory (called by DataLoader)."""
        pinned = {"pixel_values": self.pixel_values.pin_memory(), "input_ids": self.input_ids.pin_memory()}
        return Block(part=self.part, rows=self.rows, end=self.end, error=self.error, **pinned)

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process: small tensors as arrays."""
        return {
            name: value.numpy() if isinstance(value, torch.Tensor) and value.nbytes <= _SMALL_BYTES else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: torch.from_numpy(value) for name, value in state.items() if isinstance(value, np.ndarray)}
        vars(self).update(state | tensors)


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


class BlockDataset(IterableDataset[Block]):
    """Streams shards as :class:`Block` s: read, decoded, resized and tokenized, but not yet scored.

    Args:
        shards: A pattern for ``expand_shards``, or a list of what it found, which is taken
            as it is: a shard may have gone since.
        preprocess: The scorer's ``preprocess``.
        batch_size: Samples per batch; a shard's last batch may hold fewer.
        layout: Which members are image and caption.
        subset: Samples that it does not list are not decoded; they have the reason ``not_in_subset``.
        allow_pipe: Read ``pipe:`` URLs, which run shell commands.

    Raises:
        ValueError: When no shard matches.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        preprocess: ClipPreprocess,
        *,
        batch_size: int = 64,
        layout: SampleLayout | None = None,
        subset: Subset | None = None,
        allow_pipe: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if isinstance(shards, (str, Path)):
            self.urls = expand_shards(shards, allow_pipe=allow_pipe)
        else:
            self.urls = [str(url) for url in shards]
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.layout = layout or SampleLayout()
        self.subset = subset
        self.allow_pipe = allow_pipe
        #: What has come of an earlier iteration, and is not read again.
        self.progress = BlockProgress()
        #: Where workers leave what they are at.
        self.tracker = CrashTracker(self.urls, 0)

    def __iter__(self) -> Iterator[Block]:
        """Yield this worker's share; the workers of one DataLoader together yield every sample exactly once."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        worker_tracker = self.tracker.for_worker()
        for part in split_by_worker(self.urls, worker, num_workers):
            if part not in self.progress.ended:
                yield from self._read_part(part, worker_tracker)

    def _read_part(self, part: ShardPart, worker_tracker: WorkerTracker) -> Iterator[Block]:
        num_done = self.progress.num_blocks[part]

        def wanted(index: int) -> bool:
            turn, whose = divmod(index // self.batch_size, part.num_parts)
            return whose == part.part and turn >= num_done

        builder, end = _BlockBuilder(part, self, worker_tracker), None
        try:
            worker_tracker.begin_shard(part.url)
            with open_shard(part.url, allow_pipe=self.allow_pipe) as shard:
                for item in read_samples(shard, self.layout, wanted=wanted, pair_only=True):
                    if isinstance(item, ShardEnd):
                        end = item
                        continue
                    builder.add(worker_tracker.checked(part.url, item))
                    if len(builder) == self.batch_size:
                        yield builder.build()
            # Only now, since closing the shard can still tell that reading it failed.
            yield builder.build(end=end)
        except ShardError as error:
            yield builder.build(error=str(error))


class _BlockBuilder:
    """Gathers samples until they are made a batch of."""

    def __init__(self, part: ShardPart, dataset: BlockDataset, worker_tracker: WorkerTracker) -> None:
        self._part, self._preprocess, self._layout = part, dataset.preprocess, dataset.layout
        self._subset, self._worker_tracker = dataset.subset, worker_tracker
        self._samples: list[tuple[Sample, OpenPair | DropReason]] = []

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, sample: Sample) -> None:
        with self._worker_tracker.at(self._part.url, sample.index):
            try:
                self._check_listed(sample)
                self._samples.append((sample, self._preprocess.open_sample(sample, self._layout)))
            except UnusableError as unusable:
                self._samples.append((sample, unusable.reason))

    def _check_listed(self, sample: Sample) -> None:
        if self._subset is None or sample.problem is not None:
            return
        if not self._subset.holds([sample.key], [read_uid(sample)])[0]:
            raise UnusableError(DropReason.NOT_IN_SUBSET)

    def build(self, *, end: ShardEnd | None = None, error: str | None = None) -> Block:
        """Make a batch of what was added, and begin the next one."""
        usable = [opened for _, opened in self._samples if isinstance(opened, OpenPair)]
        pixel_values, tokens = self._preprocess.collate(usable)
        rows = sample_rows(self._samples, tokens)
        self._samples = []
        return Block(
            part=self._part,
            rows=rows,
            pixel_values=pixel_values,
            input_ids=tokens.input_ids,
            end=end,
            error=error,
        )


def read_blocks(
    dataset: BlockDataset, *, num_workers: int, worker_timeout: float = 0.0, pin_memory: bool = False
) -> Generator[Block]:
    """A dataset's blocks, from worker processes, in any order; goes on when a sample kills its worker.

    A sample that does so twice comes as ``decoder_crash``.

    Args:
        dataset: What to read.
        num_workers: Processes that decode; 0: this one, which a sample can kill.
        worker_timeout: Seconds that one sample may take before its worker is killed; 0 is for ever.
        pin_memory: Put tensors in page-locked memory.

    Raises:
        WorkerDiedError: When workers die at once, or one after another with no block in between.
    """
    quarantine = Quarantine()
    dataset.progress = BlockProgress()
    while True:
        dataset.tracker = CrashTracker(dataset.urls, num_workers, timeout=worker_timeout, left_out=quarantine.left_out)
        loader = worker_loader(
            dataset,
            num_workers=num_workers,
            pin_memory=pin_memory,
            in_order=False,
            tracker=dataset.tracker,
        )
        try:
            with iterating(loader) as blocks:
                for block in blocks:
                    dataset.progress.add(block)
                    quarantine.outlived()
                    yield block
            return
        except WorkerDiedError as death:
            quarantine.add(death)
