"""Shows how far a run over shards is."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from clipfilter_wds.console import Shown, pace, show_progress
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.tally import OnProgress, Phase, Tally


@contextmanager
def show_run(config: ScoreConfig, shows: bool, on_progress: OnProgress = lambda tally: None) -> Iterator[OnProgress]:
    """What shows the tally of a run of ``config`` on stderr, where it ``shows`` at all, and calls ``on_progress``."""
    with show_progress(Console(stderr=True, quiet=not shows)) as show:

        def both(tally: Tally) -> None:
            show(shown(tally, kept_as(config, tally.phase)))
            on_progress(tally)

        yield both


def kept_as(config: ScoreConfig, phase: Phase) -> str | None:
    """What the samples that a run's tally counts as kept are called; None where that is not told."""
    if not isinstance(config, RewriteConfig):
        return "scored"
    if config.needs_all_scores and phase is not Phase.COPYING:
        return "scored" if phase is Phase.SCORING else None  # who waits, waits for either
    return "kept"


def shown(tally: Tally, kept_as: str | None = "kept") -> Shown:
    """How far a run is; ``kept_as`` is what kept samples are called, None leaves their share out."""
    finished = tally.done + len(tally.failed)
    share_here = tally.share - tally.resumed / max(tally.num_shards, 1)
    seconds_left = tally.seconds / share_here * (1.0 - tally.share) if share_here > 0 and tally.share < 1 else None
    if not tally.done - tally.resumed:
        seconds_left = None  # how large a shard is, is a guess
    keep_rate = tally.counts.keep_rate if tally.counts.seen and kept_as is not None else None
    how_fast = pace(tally.samples_per_second, keep_rate, seconds_left, kept_as=kept_as or "")
    count = f"{finished}/{tally.num_shards}"
    return Shown(
        phase=tally.phase,
        share=tally.share,
        beside_bar=f"[progress.download]{count}[/] shards",
        pace=how_fast,
        line=f"{count} shards, {how_fast}",
    )
