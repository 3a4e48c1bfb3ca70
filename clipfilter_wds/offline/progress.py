"""Runs a command over shards, and shows how far it is and what came of it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from rich.console import Console

from clipfilter_wds.console import Row, count_rows, plain, print_summary
from clipfilter_wds.offline.advice import advice
from clipfilter_wds.offline.bar import show_run
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.engines.board import Board
from clipfilter_wds.offline.engines.config import DEFAULT_RANK_TIMEOUT
from clipfilter_wds.offline.engines.engine import Engine
from clipfilter_wds.offline.engines.ranks import Ranks
from clipfilter_wds.offline.next_steps import next_steps
from clipfilter_wds.offline.run import process_share
from clipfilter_wds.offline.run_logger import RunLogger
from clipfilter_wds.offline.tally import Phase, Tally
from clipfilter_wds.world import World

if TYPE_CHECKING:
    from clipfilter_wds.models.scorer import ClipScorer

_MAX_SHOWN_FAILURES = 10
_MAX_SHOWN_MISSING = 5
_MAX_SHOWN_TORN = 5


def run_with_progress(
    config: ScoreConfig,
    load_scorer: "Callable[[], ClipScorer]",
    *,
    engine: Engine | None = None,
    world: World | None = None,
    rank_timeout: float = DEFAULT_RANK_TIMEOUT,
    board: Board | None = None,
    start_log: Callable[[], RunLogger] | None = None,
    quiet: bool = False,
    reports: bool = False,
) -> Tally:
    """Load the model if one is needed, process the shards, and show how far the run is and what came of it.

    An engine loads the model itself. Of several ranks, only rank zero shows anything. With ``quiet``, it shows
    failed shards alone, on stderr. While the run works, a ``board`` shows, and has logged, what all ranks have done,
    and tells each when the others are done. Where ``reports`` says that a report is made next, nobody is told how.
    """
    ranks = Ranks(folder=config.folder, world=world or World(), timeout=rank_timeout, board=board)
    is_first = ranks.world.rank == 0
    log = start_log() if start_log is not None and is_first else None
    console = Console(stderr=True, quiet=quiet or not is_first)
    scorer: ClipScorer | Engine | None = engine
    if engine is None and not (isinstance(config, RewriteConfig) and config.scores):
        with console.status("loading the model"):
            scorer = load_scorer()
    with (
        log or nullcontext(),
        show_run(config, is_first and not quiet, log.on_progress if log else _ignore) as on_progress,
    ):
        if board is not None:
            on_progress = board.joined(ranks.world.rank, on_progress)
        tally = process_share(config, scorer, ranks, on_progress)
        if log is not None:
            log.log(tally)
    if is_first:
        _show_outcome(config, tally, quiet=quiet, reports=reports)
    return tally


def _ignore(tally: Tally) -> None:
    pass


def _show_outcome(config: ScoreConfig, tally: Tally, *, quiet: bool, reports: bool) -> None:
    if quiet:
        for line in _failures(tally):
            Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        return
    kept_as = "kept" if isinstance(config, RewriteConfig) else "scored"
    print_summary(
        Console(),
        closing_rows(tally, kept_as),
        seconds=tally.seconds,
        samples_per_second=tally.samples_per_second,
        notes=[
            *_notes(tally),
            *map(plain, advice(tally, config, reports=reports)),
            *map(plain, next_steps(config, tally, reports=reports)),
        ],
    )


def closing_rows(tally: Tally, kept_as: str) -> list[Row]:
    """The closing table; ``kept_as`` is what kept samples are called there."""
    counts, stats = tally.counts, tally.stats
    rows = count_rows(counts.seen, counts.kept, counts.dropped.items(), kept_as=kept_as)
    rows.append(("shards", tally.done, f"of {tally.num_shards:,}"))
    more: list[Row] = [
        ("  done by an earlier run", tally.resumed, ""),
        ("  missing and left out", len(tally.missing), ""),
        ("  torn (cut or damaged)", stats.torn, ""),
        ("captions truncated", stats.truncated_captions, counts.seen),
        ("keys with a suffix", stats.renamed_keys, counts.kept),
    ]
    rows += [row for row in more if row[1]]
    if stats.band and tally.phase is Phase.COPYING:
        rows.append(("within the error band", stats.in_band, f"of {stats.band:.2g} around the threshold"))
    if stats.rechecked:
        rows.append(("rechecked in float32", stats.rechecked, counts.seen))
    return rows


def _notes(tally: Tally) -> Iterator[str]:
    if tally.missing:
        more = len(tally.missing) - _MAX_SHOWN_MISSING
        named = ", ".join(map(plain, tally.missing[:_MAX_SHOWN_MISSING]))
        yield f"[yellow]missing[/] {named}{f' and {more} more; summary.json names them all' if more > 0 else ''}"
    if torn := tally.stats.torn_names:
        more = tally.stats.torn - min(len(torn), _MAX_SHOWN_TORN)
        named = ", ".join(map(plain, torn[:_MAX_SHOWN_TORN]))
        yield f"[yellow]torn[/] {named}{f' and {more} more' if more > 0 else ''}"
    if tally.cut is not None:
        yield f"cut: {tally.cut.describe()}"
    yield from _failures(tally)


def _failures(tally: Tally) -> Iterator[str]:
    for url, why in list(tally.failed.items())[:_MAX_SHOWN_FAILURES]:
        yield f"[red]failed[/] {plain(url)}: {plain(why)}"
    if len(tally.failed) > _MAX_SHOWN_FAILURES:
        yield f"… and {len(tally.failed) - _MAX_SHOWN_FAILURES} more failed shards; summary.json names them all"
