"""Shows the ranks of one machine how far all of them are, in memory that they share."""

from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray
from typing import Any

from clipfilter_wds.offline.tally import OnProgress, Phase, ShardStats, Tally
from clipfilter_wds.types import DropReason, FilterStats

#: What is counted of each rank, in the order of its numbers; then come the samples that were dropped, by reason.
_COUNTERS: tuple[Callable[[Tally], int], ...] = (
    lambda tally: tally.num_shards,
    lambda tally: tally.done + len(tally.failed),
    lambda tally: tally.resumed,
    lambda tally: tally.num_resumed,
    lambda tally: tally.num_scored,
    lambda tally: tally.num_copied,
    lambda tally: tally.stats.rechecked,
    lambda tally: tally.counts.kept,
)


class Board:
    """How far each of ``num_ranks`` processes is. Hand it to them as an argument when they start.

    Nobody waits for anybody: a number may be older than the one beside it.
    """

    def __init__(self, num_ranks: int) -> None:
        self._rows: list[Any] = [RawArray("q", len(_COUNTERS) + len(DropReason)) for _ in range(num_ranks)]
        self._num_shares = RawArray("q", num_ranks)

    def end_share(self, rank: int) -> None:
        """Note that a rank has done its share of the tasks; a run may have several kinds of them, one after another."""
        self._num_shares[rank] += 1

    def have_all_ended(self, rank: int) -> bool:
        """Whether all ranks have done as many shares as this one."""
        return all(num_shares >= self._num_shares[rank] for num_shares in self._num_shares)

    def joined(self, rank: int, on_progress: OnProgress) -> OnProgress:
        """What takes the tally of a rank, and tells ``on_progress`` of all ranks'.

        A shard that failed counts as done there.
        """
        last = Tally(num_shards=0)

        def on_own(tally: Tally) -> None:
            nonlocal last
            is_second_try = tally.phase is last.phase and tally.num_shards < last.num_shards
            if tally.phase is not Phase.WAITING and not is_second_try:  # both are about shards that others count
                self._write(rank, tally)
                last = tally
            on_progress(self._total(last))

        return on_own

    def _write(self, rank: int, tally: Tally) -> None:
        dropped = (tally.counts.dropped.get(reason, 0) for reason in DropReason)
        self._rows[rank][:] = [*(count(tally) for count in _COUNTERS), *dropped]

    def _total(self, own: Tally) -> Tally:
        sums = list(map(sum, zip(*self._rows, strict=True)))
        num_shards, done, resumed, num_resumed, num_scored, num_copied, rechecked, kept = sums[: len(_COUNTERS)]
        dropped = {reason: count for reason, count in zip(DropReason, sums[len(_COUNTERS) :], strict=True) if count}
        counts = FilterStats(seen=kept + sum(dropped.values()), kept=kept, dropped=dropped)
        return Tally(
            num_shards=num_shards,
            phase=own.phase,
            done=done,
            resumed=resumed,
            num_resumed=num_resumed,
            num_scored=num_scored,
            num_copied=num_copied,
            stats=ShardStats(counts=counts, rechecked=rechecked),
            started=own.started,
        )
