"""Renders the findings as one HTML file that needs no other file and sends no request."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from clipfilter_wds.report.compare import Comparison
from clipfilter_wds.report.findings import Findings, ScoredRun, Start
from clipfilter_wds.report.picks import Pick
from clipfilter_wds.report.pictures import Card
from clipfilter_wds.report.shard_rates import OUTLIER_DEVIATIONS, ShardRate, outliers
from clipfilter_wds.types import DropReason
from clipfilter_wds.version import __version__

#: What the page's script is made of, in this order.
_SCRIPTS = ("counts.js", "charts.js", "gallery.js", "page.js")

#: The most shards in chart and table, and the most outliers among them.
_MAX_SHARD_POINTS, _MAX_OUTLIERS = 2000, 500
_MAX_FAILED_LINES = 20

#: Why the run dropped samples without looking at their scores.
_NOT_CHOSEN = ("not_in_subset", "not_selected")


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows.

    Attributes:
        run: The score tables and the run's summary.
        findings: What the tables say.
        start: Where the threshold begins.
        cards: What is known of each sample to show.
        compared: What another folder of scores makes of the samples, if one is named.
        has_shards: Whether there were shards to take captions and pictures from.
        made: The day that the page is of.
    """

    run: ScoredRun
    findings: Findings
    start: Start
    cards: Mapping[Pick, Card]
    compared: Comparison | None
    has_shards: bool
    made: date = field(default_factory=lambda: datetime.now(UTC).date())


def render(page: Page) -> str:
    """The page's HTML.

    Texts from samples are in a JSON block that browsers don't run, and the page's script only ever shows them as text.
    A Content-Security-Policy names this script by its hash, and forbids all others and every request.
    """
    findings, summary, start = page.findings, page.run.summary, page.start
    folder = files(__package__)
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    flags = outliers(findings.shards)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(
        policy=_policy(script),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=script,
        data={
            **_scores(findings, start),
            "band": findings.band,
            "seen": findings.seen,
            "unusable": {reason: findings.unusable[reason] for reason in DropReason if findings.unusable[reason]},
            "tokens": _tokens(findings),
            "shards": _shard_points(findings.shards, flags),
            "has_shards": page.has_shards,
            "cards": [asdict(page.cards[pick]) for pick in sorted(findings.picks)],
            "unusable_cards": [asdict(page.cards[pick]) for pick in findings.unusable_picks],
        },
        findings=findings,
        folder=page.run.table.folder,
        made=page.made.isoformat(),
        num_unusable=findings.unusable.total(),
        kind=start.kind,
        compared=page.compared,
        step=f"{1 / start.grid.steps:g}",
        facts=_facts(findings, summary),
        num_outliers=sum(flags),
        outlier_deviations=OUTLIER_DEVIATIONS,
        failed=list(summary.get("failed_shards", {}).items())[:_MAX_FAILED_LINES],
        num_failed=len(summary.get("failed_shards", {})),
        not_chosen={name: summary.get("dropped", {}).get(name, 0) for name in _NOT_CHOSEN},
        keep_fraction=summary.get("keep_fraction"),
        run_groups=summary.get("groups"),
        run_kept=summary.get("kept"),
        run_cut=start.cut,
        has_shards=page.has_shards,
        version=__version__,
    )


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _scores(findings: Findings, start: Start) -> dict[str, Any]:
    """Counts of scores, from a step below the lowest or 0 to a step above the highest or the threshold."""
    counts, kind = findings.scores, start.kind
    lowest, highest = (counts.lowest, counts.highest) if counts.total else (0.0, 0.0)
    grid = counts.grid
    first, last = grid.first, grid.last
    if kind.is_cosine:
        first = max(first, min(0, math.floor(lowest * grid.steps) - 1))
        last = min(last, max(math.ceil(max(highest, start.threshold) * grid.steps) + 1, 0))
    return {
        "kind": kind.name,
        "is_cosine": kind.is_cosine,
        "steps": grid.steps,
        "first_step": first,
        "at_least": counts.at_least(first, last),
        "lowest": lowest,
        "highest": highest,
        "threshold": start.threshold,
        "is_cut": start.cut is not None,
        "cut": None if start.cut is None else start.cut.score,
        "kept": findings.kept,
    }


def _tokens(findings: Findings) -> dict[str, Any]:
    return {
        "counts": findings.num_tokens.tolist(),
        "max_tokens": findings.max_tokens,
        "truncated": findings.truncated,
    }


def _shard_points(shards: Sequence[ShardRate], flags: Sequence[bool]) -> dict[str, Any]:
    """The chart's points in the order of the shards: outliers, and as many others as a browser draws easily."""
    far = [number for number, flag in enumerate(flags) if flag][:_MAX_OUTLIERS]
    others = [number for number, flag in enumerate(flags) if not flag]
    every = math.ceil(len(others) / (_MAX_SHARD_POINTS - len(far)))
    shown = sorted(far + others[:: every or 1])
    points = [{"number": number, **asdict(shards[number]), "outlier": flags[number]} for number in shown]
    return {"total": len(shards), "points": points}


def _facts(findings: Findings, summary: Mapping[str, Any]) -> dict[str, str]:
    """What made the scores: precision and fingerprint from the tables, and more from the run's summary."""
    fingerprint = dict(findings.fingerprint)
    leading = {name: fingerprint.pop(name, None) for name in ("model", "precision")}
    run = {name: summary.get(name) for name in ("samples_per_second", "version")}
    facts = {**leading, "band": findings.band, "rechecked": findings.rechecked, **fingerprint, **run}
    return {name.replace("_", " "): _value(value) for name, value in facts.items() if value is not None}


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
