"""Runs one epoch of a loader: its batches, made in workers and a thread, how far they are, and how training ends."""

import logging
import math
from collections.abc import Iterator
from typing import Any

from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.training.packer import Packed, Packer
from clipfilter_wds.training.source import BatchSource
from clipfilter_wds.training.state import LoaderState, Progress
from clipfilter_wds.world import Agreement, World

_log = logging.getLogger(__name__)

_READY, _OUT_OF_BATCHES, _FAILED = 2, 1, 0


class Epoch:
    """One iteration of a loader, from a state on.

    Args:
        source: Gives scored batches.
        config: The loader's.
        world: This rank among all.
        begin: Where the iteration begins.

    Attributes:
        world: This rank among all.
        begun_at: Where the iteration began.
        num_left_over: Batches that the ranks had ready and did not get, when it ended on all of them.
    """

    def __init__(self, source: BatchSource, config: LoaderConfig, world: World, begin: LoaderState) -> None:
        self.world, self.begun_at = world, begin
        self._packer = Packer(config, begin, has_scores=source.has_scores, kind=source.kind, layout=source.layout)
        self._source, self._batch_size, self._drop_last = source, config.batch_size, config.drop_last
        self._batches = source.packed(self._packer)
        self._last: Packed | None = None
        self.num_left_over = 0

    def next_batch(self) -> dict[str, Any] | None:
        """The next training batch, None when the epoch has no more."""
        self._last = next(self._batches, self._last)
        assert self._last is not None, "packing ends with a word about the end"
        return self._last.batch

    @property
    def progress(self) -> Progress:
        """How far the stream was when the last batch was packed."""
        return self.begun_at.progress if self._last is None else self._last.progress

    @property
    def num_seen(self) -> int:
        """Samples of this iteration that had been scored by then."""
        return 0 if self._last is None else self._last.num_seen

    @property
    def num_kept(self) -> int:
        """How many of them are kept."""
        return 0 if self._last is None else self._last.num_kept

    @property
    def num_ready(self) -> int:
        """How many of these were in no batch yet."""
        return 0 if self._last is None else self._last.num_ready

    @property
    def state(self) -> LoaderState:
        """The loader's state after the last batch."""
        return self.begun_at if self._last is None else self._last.state

    def starved(self, what: str) -> StarvationError:
        """The error to raise when nothing is kept, with what is known of the scores."""
        return self._packer.watch.starved(what)

    def close(self) -> None:
        """Stop workers and thread."""
        self._batches.close()

    def end_together(self, agreement: Agreement, num_batches: int, *, unused: bool) -> None:
        """Count and tell, with the other ranks, what is left over when the first has no further batch.

        Args:
            agreement: Of the ranks.
            num_batches: How many each was given in this epoch.
            unused: Whether this one had another.

        Raises:
            StarvationError: When no rank kept anything.
        """
        whole = math.floor if self._drop_last else math.ceil
        ready = whole(self.num_ready / self._batch_size) + unused
        self._source.flush_record()  # before any rank begins the next epoch and reads what others have recorded
        told = agreement.gather((ready, self.num_kept, self.num_seen))
        self.num_left_over = sum(ready for ready, _, _ in told)
        if num_batches == 0 and not any(kept for _, kept, _ in told):
            raise self.starved(f"a whole epoch of {sum(seen for *_, seen in told):,} samples left none")
        if num_batches == 0 and not self.num_left_over and self.world.rank == 0:  # a loop over epochs may never end
            _log.warning(
                "the epoch gave no batch: batch_size is %d, no rank keeps as many pairs (by rank: %s), and drop_last "
                "leaves smaller batches out. Lower batch_size, or leave out drop_last",
                self._batch_size,
                [kept for _, kept, _ in told],
            )
        if self.num_left_over and self.world.rank == 0:  # once, as every rank knows the totals
            _log.warning(
                "the epoch ended after %d batches on every rank, when the first had no more; at least %d were ready "
                "and left over (by rank: %s). More shards, shuffling, or end='repeat' use them",
                num_batches,
                self.num_left_over,
                [ready for ready, _, _ in told],
            )


def training_batches(epoch: Epoch, agreement: Agreement, config: LoaderConfig) -> Iterator[dict[str, Any]]:
    """The batches of this rank, which are as many as those of every other.

    Raises:
        StarvationError: When nothing is kept.
        RuntimeError: When another rank failed.
    """
    num_batches = epoch.begun_at.batches
    while config.batches_per_epoch is None or num_batches < config.batches_per_epoch:
        try:
            batch = epoch.next_batch()
        except Exception:
            agreement.lowest(_FAILED)  # the other ranks must not wait for this one
            raise
        status = agreement.lowest(_READY if batch is not None else _OUT_OF_BATCHES)
        if status == _FAILED:
            raise other_rank_failed()
        if status == _OUT_OF_BATCHES:
            epoch.end_together(agreement, num_batches, unused=batch is not None)
            return
        num_batches += 1
        yield batch  # type: ignore[misc]  # every rank has one


def other_rank_failed() -> RuntimeError:
    """The error to raise when another rank told that it failed."""
    return RuntimeError("another rank's data loading failed; its own error says why")
