"""Makes the report: reads score tables and shards, and writes the page."""

from collections.abc import Sequence

import numpy as np

from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.findings import Findings, ScoredRun, gather
from clipfilter_wds.report.histogram import STEPS, ScoreCounts
from clipfilter_wds.report.page import render
from clipfilter_wds.report.pictures import make_cards
from clipfilter_wds.scores.selection import DEFAULT_THRESHOLD
from clipfilter_wds.scores.table import ShardScores
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
    threshold = _threshold(config, run)
    findings = gather(run, threshold, config.thumbnails)
    cards = make_cards(findings.picks, run, urls)
    page = render(findings, cards, run.summary, threshold, has_shards=bool(urls))
    with publish(any_path(config.output)) as file:
        file.write(page.encode())
    return findings


def _threshold(config: ReportConfig, run: ScoredRun) -> float:
    """Where the slider begins: as configured, or at the run's threshold, or where its keep fraction cuts."""
    chosen = config.threshold if config.threshold is not None else run.summary.get("threshold")
    if chosen is not None:
        return float(chosen)
    if (fraction := run.summary.get("keep_fraction")) is not None:
        return _threshold_of(fraction, run)
    return 0.0 if run.summary.get("subset") is not None else DEFAULT_THRESHOLD


def _threshold_of(fraction: float, run: ScoredRun) -> float:
    """The slider's highest threshold that keeps at least this share of the samples that could be scored."""
    counts = ScoreCounts()
    for path in run.table.paths:
        scores = ShardScores.read(path)
        counts.add(scores.scores[scores.usable])
    at_least = np.array(counts.at_least(0, STEPS))
    at_least[0] = counts.total  # a score below 0 is clipped to it
    return float(np.nonzero(at_least >= round(fraction * counts.total))[0][-1] / STEPS)
