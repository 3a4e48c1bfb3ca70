"""Makes the report: reads score tables and shards, and writes the page."""

from collections.abc import Sequence
from functools import partial
from math import isfinite
from pathlib import Path

from clipfilter_wds.report.compare import compare
from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.findings import Findings, ScoredRun, Start, gather
from clipfilter_wds.report.histogram import grid_of
from clipfilter_wds.report.page import Page, render
from clipfilter_wds.report.pictures import cards_by_pick
from clipfilter_wds.scores.fraction import Cut, find_cutoffs
from clipfilter_wds.scores.kind import DEFAULT_THRESHOLD
from clipfilter_wds.shards.urls import find_shards
from clipfilter_wds.storage.paths import any_path
from clipfilter_wds.storage.publish import publish


def write_report(config: ReportConfig, urls: Sequence[str] | None = None) -> Findings:
    """Write the page, and return what it was made of.

    Args:
        config: What the page is about.
        urls: The shards that ``config.shards`` stands for, where that is known.

    Raises:
        ValueError: When there are no score tables, they have different fingerprints, or no shard matches.
        OSError: When the page can't be written.
    """
    run = ScoredRun.open(config.scores, run=config.run)
    if urls is None:
        urls = [] if config.shards is None else find_shards(config.shards, skip_missing=True).urls
    start = _start(config, run)
    findings = gather(run, start, config.thumbnails)
    findings.num_at_hand = len({run.table.path(url) for url in urls} - {None})
    cards = cards_by_pick([*findings.picks, *findings.unusable_picks], run, urls)
    compared = None
    if config.compare is not None:
        compared = compare(run, ScoredRun.open(config.compare), start, findings.scores, urls)
    page = render(Page(run=run, findings=findings, start=start, cards=cards, compared=compared, has_shards=bool(urls)))
    with publish(any_path(config.output)) as file:
        file.write(page.encode())
    return findings


def describe_lacking(config: ReportConfig, findings: Findings) -> str | None:
    """What to tell whoever named shards, where not all that were scored are among them."""
    num_scored = len(findings.shards)
    if config.shards is None or findings.num_at_hand == num_scored:
        return None
    given = [config.shards] if isinstance(config.shards, str | Path) else config.shards
    where = str(given[0]) if len(given) == 1 else f"the {len(given):,} that are named"
    scored = f"{num_scored:,} scored shard{'' if num_scored == 1 else 's'}"
    if not findings.num_at_hand:
        return f"found none of {scored} in {where}: the report has no pictures"
    return f"found {findings.num_at_hand:,} of {scored} in {where}: the report has no pictures of the others"


def _start(config: ReportConfig, run: ScoredRun) -> Start:
    """Where the slider begins: as configured, at the run's threshold, or exactly where its fraction was cut."""
    summary, kind = run.summary, run.table.kind
    grid = grid_of(kind, run.read_usable)
    start = partial(Start, kind=kind, grid=grid)
    chosen = config.threshold if config.threshold is not None else summary.get("threshold")
    if chosen is not None:
        return start(float(chosen))
    if "cut" in summary:
        cut = Cut(score=summary["cut"], num_ties_dropped=summary.get("cut_ties_dropped", 0))
        return start(grid.last / grid.steps if cut.score is None else float(cut.score), cut)
    if not kind.is_cosine:
        middle = find_cutoffs(run.read_usable, 0.5)[0].score
        return start(middle if isfinite(middle) else 0.0)
    return start(DEFAULT_THRESHOLD if summary.get("subset") is None and summary.get("where") is None else 0.0)
