"""Runs ``rescore`` or ``dedup``, and shows how far it is and what came of it."""

import time
from collections.abc import Iterator

from rich.console import Console

from clipfilter_wds.console import Shown, plain, print_summary, show_progress
from clipfilter_wds.offline.bar import shown
from clipfilter_wds.offline.next_steps import rewrite_next
from clipfilter_wds.offline.progress import closing_rows
from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig
from clipfilter_wds.offline.rescoring.method import Preparing
from clipfilter_wds.offline.rescoring.run import rescore_shards
from clipfilter_wds.offline.tally import Tally
from clipfilter_wds.world import World


def run_with_progress(config: RescoreConfig | DedupConfig, *, world: World | None = None, quiet: bool = False) -> Tally:
    """Make the tables, and show how far the run is and what came of it; of several ranks, rank zero does."""
    is_first = world is None or world.rank == 0
    kept_as = "kept" if _drops(config) else "scored"
    began = time.perf_counter()  # preparing may take longer than all that comes after it
    with show_progress(Console(stderr=True, quiet=quiet or not is_first)) as show:
        tally = rescore_shards(
            config,
            world=world,
            on_preparing=lambda preparing: show(_preparing(preparing)),
            on_progress=lambda tally: show(shown(tally, kept_as)),
        )
    if is_first and not quiet:
        seconds = time.perf_counter() - began
        print_summary(
            Console(),
            closing_rows(tally, kept_as),
            seconds=seconds,
            samples_per_second=tally.num_scored / max(seconds, 1e-9),
            notes=_notes(config, tally),
        )
    return tally


def _drops(config: RescoreConfig | DedupConfig) -> bool:
    return isinstance(config, DedupConfig) or config.method == "then"


def _preparing(preparing: Preparing) -> Shown:
    phase, done, total, unit = preparing
    count = f"{done:,}/{total:,} {unit}"
    return Shown(
        phase=phase,
        share=done / max(total, 1),
        beside_bar=f"[progress.download]{count}[/]",
        pace="",
        line=f"{phase}: {count}",
    )


def _notes(config: RescoreConfig | DedupConfig, tally: Tally) -> Iterator[str]:
    if tally.counts.seen and not tally.counts.kept:
        yield "none of the samples has a score"
    if tally.num_shards and tally.resumed == tally.num_shards:
        yield "all of it was done by an earlier run; nothing was left to do"
    yield f"the score tables are in {plain(str(config.folder))}"
    choice = "--keep_fraction 1" if _drops(config) else "--keep_fraction 0.3"
    yield plain(rewrite_next("SHARDS", config.folder, choice))
