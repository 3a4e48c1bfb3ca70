"""Makes the report: reads score tables and shards, and writes the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipfilter_wds.report.findings import Findings, ScoredRun, gather
from clipfilter_wds.report.histogram import STEPS, ScoreCounts
from clipfilter_wds.report.page import render
from clipfilter_wds.report.pictures import make_cards
from clipfilter_wds.scores.selection import DEFAULT_THRESHOLD, check_threshold
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.paths import RemotePath, any_path
from clipfilter_wds.storage.publish import check_writable, publish

#: With more, the page would open slowly on a phone.
_MAX_THUMBNAILS = 200


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a report is made of.

    Attributes:
        scores: The output folder of a ``score`` or ``rewrite`` run.
        output: The HTML file to write; an existing one is replaced.
        shards: The shards to take captions and pictures from, as ``expand_shards`` takes them; None shows neither.
        run: The output folder of the ``rewrite`` run to show, where its tables are elsewhere (``rewrite --scores``).
        threshold: Where the slider begins; None takes the run's own choice.
        thumbnails: How many samples the gallery shows, at most 200.

    Raises:
        ValueError: When one of them can't be used.
    """

    scores: str | Path
    output: str | Path
    shards: str | Path | Sequence[str | Path] | None = None
    run: str | Path | None = None
    threshold: float | None = None
    thumbnails: int = 120

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold)
        if not 0 <= self.thumbnails <= _MAX_THUMBNAILS:
            raise ValueError(f"thumbnails is {self.thumbnails}; it must lie in 0..{_MAX_THUMBNAILS}")
        check_page(self.output, of=self.scores)


def check_page(output: str | Path, *, of: str | Path) -> None:
    """Check that a page can be written, and made from the score tables in a folder that may not exist yet.

    Raises:
        ValueError: When it can't be written, or the tables are on remote storage.
    """
    if isinstance(any_path(of), RemotePath):
        raise ValueError(
            f"a report is made from score tables of this machine; {without_secrets(str(of))!r} is not here"
        )
    check_writable(any_path(output), as_file=True)


def write_report(config: ReportConfig) -> Findings:
    """Write the page, and return what it was made of.

    Raises:
        ValueError: When there are no score tables, they have different fingerprints, or no shard matches.
        OSError: When the page can't be written.
    """
    run = ScoredRun.open(config.scores, run=config.run)
    urls = [] if config.shards is None else expand_shards(config.shards)
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
