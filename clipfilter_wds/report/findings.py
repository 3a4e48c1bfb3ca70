"""Gathers what the report says, but for pictures and captions, in one pass over the score tables."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from clipfilter_wds.report.histogram import COSINE_GRID, Grid, ScoreCounts
from clipfilter_wds.report.picks import FirstOfEach, Pick, Picker
from clipfilter_wds.report.shard_rates import ShardRate
from clipfilter_wds.report.summary import Summary, read_rewrite, read_summary
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.fraction import Cut
from clipfilter_wds.scores.kind import COSINES, ScoreKind
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.storage.paths import any_path
from clipfilter_wds.types import DropReason

#: Captions longer than the text tower's limit times this number are counted together.
_TOKEN_LIMITS = 2

#: Of two scores that lie less than so many steps apart, one is shown.
_STEPS_ALIKE = 10

#: Of the samples that could not be scored, so many are shown of each reason.
_SHOWN_PER_REASON = 6


@dataclass(frozen=True)
class ScoredRun:
    """Score tables, and the summary of the run that wrote them.

    Attributes:
        table: The tables.
        summary: The content of ``summary.json``, empty where there is none.
    """

    table: ScoreFolder
    summary: Summary

    @classmethod
    def open(cls, scores: str | Path, *, run: str | Path | None = None) -> "ScoredRun":
        """Open the score tables of a ``score`` or ``rewrite`` run.

        Args:
            scores: Its output folder, or another folder with score tables.
            run: The output folder of the ``rewrite`` whose summary is shown, if that is elsewhere.

        Raises:
            ValueError: When there are no tables, they have different fingerprints, the summary is damaged, or ``run``
                holds none or that of other scores.
        """
        table = ScoreFolder(scores)
        if run is not None:
            return cls(table, read_rewrite(any_path(run), table))
        return cls(table, read_summary(table.folder.parent if table.folder.name == "_scores" else table.folder))

    def read_usable(self) -> Iterator[np.ndarray]:
        """The scores of what could be scored, float32 ``[N]``, one table after another."""
        for path in self.table.paths:
            scores = ShardScores.read(path)
            yield scores.scores[scores.usable]

    def name(self, path: Path) -> str:
        """The name of a table's shard in the run's output, without suffix."""
        return path.relative_to(self.table.folder).with_suffix("").as_posix()


@dataclass(kw_only=True)
class Findings:
    """What the tables say.

    Attributes:
        fingerprint: What made the scores; the same for all tables.
        seen: How many samples there are.
        kept: How many of them the threshold keeps.
        unusable: Per reason, how many could not be scored.
        scores: The scores of the others.
        num_tokens: int64 ``[L]``: how many captions have each length in tokens; the last entry counts all longer ones.
        truncated: How many captions were longer than the text tower takes.
        band: The widest error band around the threshold in any of the tables.
        rechecked: How many scores were computed again in float32, because they lay within the band.
        shards: The keep rate of each table's shard.
        picks: The samples to show.
        unusable_picks: Some samples of each reason, to show.
        num_at_hand: Of how many tables the shard was among those to read captions and pictures from.
    """

    fingerprint: Fingerprint
    seen: int = 0
    kept: int = 0
    unusable: Counter[DropReason] = field(default_factory=Counter)
    scores: ScoreCounts = field(default_factory=ScoreCounts)
    num_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    truncated: int = 0
    band: float = 0.0
    rechecked: int = 0
    shards: list[ShardRate] = field(default_factory=list)
    picks: list[Pick] = field(default_factory=list)
    unusable_picks: list[Pick] = field(default_factory=list)
    num_at_hand: int = 0

    @property
    def max_tokens(self) -> int:
        """The text tower's limit, in tokens."""
        return int(self.fingerprint["max_tokens"])


@dataclass(frozen=True)
class Start:
    """Where the page starts.

    Attributes:
        threshold: What the slider begins at.
        cut: Where the run's own fraction of the scores ends; None where the threshold alone decides.
        kind: Of the scores.
        grid: At which thresholds they are counted.
    """

    threshold: float
    cut: Cut | None = None
    kind: ScoreKind = COSINES
    grid: Grid = COSINE_GRID

    def keeps(self, scores: np.ndarray) -> np.ndarray:
        """Whether each raw score, float32 ``[N]``, is kept: bool ``[N]``."""
        return self.kind.passes(scores, self.threshold) if self.cut is None else self.cut.keeps(scores)


def gather(run: ScoredRun, start: Start, num_picks: int) -> Findings:
    """Read the tables one at a time. Memory grows with the number of tables (a line for each), not of samples.

    Raises:
        ValueError: When a table is damaged.
    """
    findings = Findings(fingerprint=run.table.fingerprint, scores=ScoreCounts(start.grid))
    findings.num_tokens = np.zeros(_TOKEN_LIMITS * findings.max_tokens + 2, dtype=np.int64)
    picker = Picker(start.threshold, num_picks, keeps=start.keeps, spread_width=_STEPS_ALIKE / start.grid.steps)
    unusable = FirstOfEach(min(_SHOWN_PER_REASON, num_picks // 5))
    for number, path in enumerate(run.table.paths):
        scores = ShardScores.read(path)
        _count(findings, scores, run.name(path), start)
        picker.add(number, scores.scores, scores.usable)
        unusable.add(number, scores.reasons)
    findings.picks, findings.unusable_picks = picker.finish(), unusable.picks
    if start.cut is not None:
        _leave_out_ties(findings, start.cut)
    return findings


def _leave_out_ties(findings: Findings, cut: Cut) -> None:
    """Count the ties that the run dropped as dropped: those of the last shards."""
    left = cut.num_ties_dropped
    for number, shard in reversed([*enumerate(findings.shards)]):
        num_dropped = min(left, shard.num_ties)
        findings.shards[number] = replace(shard, kept=shard.kept - num_dropped)
        findings.kept -= num_dropped
        left -= num_dropped


def _count(findings: Findings, table: ShardScores, name: str, start: Start) -> None:
    scores, usable = table.scores, table.usable
    kept = int((usable & start.keeps(scores)).sum())
    has_cut = start.cut is not None and start.cut.score is not None
    num_ties = int((usable & (scores == np.float32(start.threshold))).sum()) if has_cut else 0
    longest = len(findings.num_tokens) - 1
    tokens = np.minimum(table.table["num_tokens"].to_numpy()[usable], longest)
    findings.seen += len(scores)
    findings.kept += kept
    findings.unusable.update(table.dropped)
    findings.scores.add(scores[usable])
    findings.num_tokens += np.bincount(tokens, minlength=longest + 1)
    findings.truncated += table.num_truncated
    findings.band = max(findings.band, table.metadata.band)
    findings.rechecked += table.metadata.rechecked
    findings.shards.append(
        ShardRate(
            name=name,
            seen=len(scores),
            kept=kept,
            torn=table.metadata.torn,
            num_ties=num_ties,
            scored=int(usable.sum()),
            median=float(np.median(scores[usable])) if usable.any() else None,
        )
    )
