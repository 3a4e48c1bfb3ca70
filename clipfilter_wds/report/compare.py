"""Compares two folders of scores of the same shards: how many samples move, and which move most."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipfilter_wds.report.findings import ScoredRun, Start
from clipfilter_wds.report.histogram import ScoreCounts, grid_of
from clipfilter_wds.report.picks import Least, Pick
from clipfilter_wds.report.pictures import Card, cards_by_pick
from clipfilter_wds.scores.fraction import Cutoff, find_cutoffs
from clipfilter_wds.scores.kind import ScoreKind
from clipfilter_wds.scores.same_shard import check_same_samples
from clipfilter_wds.scores.table import ShardScores

#: Samples to show that rise, and that fall.
_NUM_SHOWN = 12


@dataclass(frozen=True)
class Moved:
    """A sample that the two rank differently.

    Attributes:
        card: What is shown of it.
        score: Its score there.
        below: Share of the scores below its own here.
        below_there: Likewise there.
    """

    card: Card
    score: float
    below: float
    below_there: float


@dataclass(kw_only=True)
class Comparison:
    """What another folder of scores makes of the same samples, where as many are kept.

    Attributes:
        folder: The other folder.
        kind: Of the scores there.
        threshold: The lowest score there that is kept; None when none is.
        both: How many samples both keep.
        only_here: How many are kept here alone.
        only_there: How many are kept there alone.
        neither: How many neither keeps.
        risen: Those that rank higher there, the largest difference first.
        fallen: Those that rank lower there.
    """

    folder: Path
    kind: ScoreKind
    threshold: float | None
    both: int = 0
    only_here: int = 0
    only_there: int = 0
    neither: int = 0
    risen: list[Moved] = field(default_factory=list)
    fallen: list[Moved] = field(default_factory=list)


def compare(run: ScoredRun, other: ScoredRun, start: Start, counts: ScoreCounts, urls: Sequence[str]) -> Comparison:
    """Read both folders, a table of each at a time.

    Args:
        run: The folder that is shown.
        other: The one that it is compared with.
        start: What is kept of the first.
        counts: Its scores.
        urls: Shards to read captions and pictures from.

    Raises:
        ValueError: When they are not of the same shards and samples, or the other has more.
    """
    paths = [_counterpart(run, path, other) for path in run.table.paths]
    _check_none_beyond(paths, run, other)
    num_kept = sum(int(_keeps(ShardScores.read(path), start).sum()) for path in run.table.paths)
    there = ScoreCounts(grid_of(other.table.kind, other.read_usable))
    for scores in other.read_usable():
        there.add(scores)
    fraction = min(1.0, num_kept / there.total) if there.total else 0.0
    cutoffs = dict(zip(other.table.paths, find_cutoffs(other.read_usable, fraction), strict=True))
    lowest = min((cutoff.score for cutoff in cutoffs.values()), default=np.inf)
    threshold = lowest if np.isfinite(lowest) else None
    found = Comparison(folder=other.table.folder, kind=other.table.kind, threshold=threshold)
    risen, fallen = Least(_NUM_SHOWN), Least(_NUM_SHOWN)
    for number, (path, path_there) in enumerate(zip(run.table.paths, paths, strict=True)):
        here, theirs = ShardScores.read(path), ShardScores.read(path_there)
        check_same_samples(path_there, theirs, path, here)
        _count(found, _keeps(here, start), _keeps_cut(theirs, cutoffs[path_there]))
        rows = np.flatnonzero(here.usable & theirs.usable)
        rise = there.shares_below(theirs.scores[rows]) - counts.shares_below(here.scores[rows])
        for least, costs in ((risen, -rise), (fallen, rise)):
            moves = costs < 0
            least.add(number, rows[moves], here.scores[rows][moves], costs=costs[moves])
    shown = cards_by_pick([*risen.picks, *fallen.picks], run, urls)
    scores_there = _scores_of([*risen.picks, *fallen.picks], paths)

    def moved(pick: Pick) -> Moved:
        score = scores_there[pick]
        shares = (of.shares_below(np.array([own]))[0] for of, own in ((counts, pick.score), (there, score)))
        return Moved(shown[pick], score, *map(float, shares))

    found.risen, found.fallen = (list(map(moved, least.picks)) for least in (risen, fallen))
    return found


def _counterpart(run: ScoredRun, path: Path, other: ScoredRun) -> Path:
    """The other folder's table of the same shard: of the same name, or else made from the same URL."""
    same = other.table.folder / path.relative_to(run.table.folder)
    found = same if same.is_file() else other.table.path(ShardScores.read(path).metadata.shard)
    if found is None:
        raise ValueError(f"{str(other.table.folder)!r} has no scores of the shard of {str(path)!r}")
    return found


def _check_none_beyond(paths: Sequence[Path], run: ScoredRun, other: ScoredRun) -> None:
    """Refuse a folder of more shards: its ranks, and how many it keeps, would be of samples that are not compared."""
    if beyond := sorted({*other.table.paths} - {*paths}):
        raise ValueError(
            f"{str(beyond[0])!r}{f' and {len(beyond) - 1} more' if len(beyond) > 1 else ''} has no counterpart in "
            f"{str(run.table.folder)!r}; compare scores of the same shards"
        )


def _keeps(scores: ShardScores, start: Start) -> np.ndarray:
    keeps: np.ndarray = scores.usable & start.keeps(scores.scores)
    return keeps


def _keeps_cut(scores: ShardScores, cutoff: Cutoff) -> np.ndarray:
    keeps = scores.usable
    keeps[keeps] = cutoff.keeps(scores.scores[keeps])
    return keeps


def _count(found: Comparison, here: np.ndarray, there: np.ndarray) -> None:
    found.both += int((here & there).sum())
    found.only_here += int((here & ~there).sum())
    found.only_there += int((~here & there).sum())
    found.neither += int((~here & ~there).sum())


def _scores_of(picks: Sequence[Pick], paths: Sequence[Path]) -> dict[Pick, float]:
    tables = {table: ShardScores.read(paths[table]).scores for table in {pick.table for pick in picks}}
    return {pick: float(tables[pick.table][pick.index]) for pick in picks}
