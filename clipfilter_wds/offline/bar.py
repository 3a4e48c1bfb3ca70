"""Shows how far a run over shards is."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from clipfilter_wds.console import Shown, pace, show_progress
from clipfilter_wds.offline.tally import OnProgress, Tally


@contextmanager
def show_run(shows: bool, on_progress: OnProgress = lambda tally: None) -> Iterator[OnProgress]:
    """What shows a run's tally on stderr, where it ``shows`` at all, and calls ``on_progress``."""
    with show_progress(Console(stderr=True, quiet=not shows)) as show:

        def both(tally: Tally) -> None:
            show(shown(tally))
            on_progress(tally)

        yield both


def shown(tally: Tally) -> Shown:
    """How far a run is."""
    finished = tally.done + len(tally.failed)
    share_here = tally.share - tally.resumed / max(tally.num_shards, 1)
    seconds_left = tally.seconds / share_here * (1.0 - tally.share) if share_here > 0 and tally.share < 1 else None
    if not tally.done - tally.resumed:
        seconds_left = None  # how large a shard is, is a guess
    how_fast = pace(tally.samples_per_second, tally.counts.keep_rate if tally.counts.seen else None, seconds_left)
    count = f"{finished}/{tally.num_shards}"
    return Shown(
        phase=tally.phase,
        share=tally.share,
        beside_bar=f"[progress.download]{count}[/] shards",
        pace=how_fast,
        line=f"{count} shards, {how_fast}",
    )
