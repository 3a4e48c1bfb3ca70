"""Shows how a run over shards goes, and how it went."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from transformers.utils import logging

from clipfilter_wds.console import plain, share
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.engines.engine import Engine
from clipfilter_wds.offline.engines.ranks import DEFAULT_RANK_TIMEOUT
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.offline.tally import OnProgress, Phase, Tally
from clipfilter_wds.world import World

#: Seconds between two lines when nobody watches a bar.
_LINE_SECONDS = 10.0
_MAX_SHOWN_FAILURES = 10


def run_with_progress(
    config: ScoreConfig,
    load_scorer: Callable[[], ClipScorer],
    *,
    engine: Engine | None = None,
    world: World | None = None,
    rank_timeout: float = DEFAULT_RANK_TIMEOUT,
) -> Tally:
    """Load the model, if one is needed, process the shards, and show what is going on and what came out.

    An engine loads the model itself. Of several ranks, only rank zero shows anything.
    """
    logging.disable_progress_bar()
    is_first = world is None or world.rank == 0
    console = Console(stderr=True, quiet=not is_first)
    scorer: ClipScorer | Engine | None = engine
    if engine is None and not (isinstance(config, RewriteConfig) and config.scores):
        with console.status("loading the model"):
            scorer = load_scorer()
    with show_progress(console) as update:
        tally = process_shards(config, scorer, world=world, rank_timeout=rank_timeout, on_progress=update)
    if is_first:
        print_summary(Console(), tally, scored_only=not isinstance(config, RewriteConfig))
    return tally


@contextmanager
def show_progress(console: Console) -> Iterator[OnProgress]:
    """A function that shows a tally: as a bar on a terminal, as a line now and then elsewhere."""
    if console.is_terminal:
        with _bar(console) as update:
            yield update
    else:
        yield _lines(console)


@contextmanager
def _bar(console: Console) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards  {task.fields[pace]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("scoring", total=None, pace="")

        def update(tally: Tally) -> None:
            progress.update(
                task,
                description=tally.phase,
                total=tally.num_shards,
                completed=tally.done + len(tally.failed),
                pace=_pace(tally),
            )

        yield update


def _lines(console: Console) -> OnProgress:
    next_at = time.monotonic() + _LINE_SECONDS

    def update(tally: Tally) -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + _LINE_SECONDS
            console.print(
                f"{tally.done + len(tally.failed)}/{tally.num_shards} shards, {_pace(tally)}", highlight=False
            )

    return update


def _pace(tally: Tally) -> str:
    parts = [f"{tally.samples_per_second:,.0f} samples/s"]
    if tally.counts.seen:
        parts.append(f"{tally.counts.keep_rate:.1%} kept")
    done, left = tally.done - tally.resumed + len(tally.failed), tally.num_shards - tally.done - len(tally.failed)
    if done and left:
        parts.append(f"{timedelta(seconds=round(tally.seconds / done * left))} left")
    return ", ".join(parts)


def print_summary(console: Console, tally: Tally, *, scored_only: bool) -> None:
    """Print the closing table, and the shards that failed."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    counts, stats = tally.counts, tally.stats
    table.add_row("seen", f"{counts.seen:,}", "")
    table.add_row(
        "[bold]scored[/]" if scored_only else "[bold]kept[/]", f"{counts.kept:,}", share(counts.kept, counts.seen)
    )
    for reason, count in counts.dropped.items():
        table.add_row(f"dropped: {reason}", f"{count:,}", share(count, counts.seen))
    table.add_row("shards", f"{tally.done:,}", f"of {tally.num_shards:,}")
    if tally.resumed:
        table.add_row("  done by an earlier run", f"{tally.resumed:,}", "")
    if stats.torn:
        table.add_row("  torn (cut or damaged)", f"{stats.torn:,}", "")
    if stats.truncated_captions:
        table.add_row(
            "captions truncated", f"{stats.truncated_captions:,}", share(stats.truncated_captions, counts.seen)
        )
    if stats.renamed:
        table.add_row("keys with a suffix", f"{stats.renamed:,}", share(stats.renamed, counts.kept))
    if stats.band and tally.phase is Phase.COPYING:
        table.add_row("within the error band", f"{stats.in_band:,}", f"of {stats.band:.2g} around the threshold")
    if stats.rechecked:
        table.add_row("rechecked in float32", f"{stats.rechecked:,}", share(stats.rechecked, counts.seen))
    table.add_row("time", str(timedelta(seconds=round(tally.seconds))), f"{tally.samples_per_second:,.0f} samples/s")
    console.print(table)
    for url, why in list(tally.failed.items())[:_MAX_SHOWN_FAILURES]:
        console.print(f"[red]failed[/] {plain(url)}: {plain(why)}", highlight=False, soft_wrap=True)
    if len(tally.failed) > _MAX_SHOWN_FAILURES:
        console.print(
            f"… and {len(tally.failed) - _MAX_SHOWN_FAILURES} more failed shards; summary.json names them all"
        )
