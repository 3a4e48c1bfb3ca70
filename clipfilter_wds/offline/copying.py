"""What becomes of a shard: a score table, or the kept samples and a commit mark. Picklable, one per shard."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clipfilter_wds.offline.commit import Marked, OutputFiles, stats_of
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.fraction import Cutoff
from clipfilter_wds.scores.selection import Choice, select
from clipfilter_wds.scores.table import ShardScores, read_scores
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.open import open_shard, shard_num_bytes
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.storage.publish import publish
from clipfilter_wds.types import FilterStats, Sample, ShardEnd, ShardError


class Output(Marked, Protocol):
    """What is made of a shard as soon as it is scored."""

    def commit(self, scores: ShardScores) -> ShardStats:
        """Write the outcome of the shard; when this returns, it is on disk and whole.

        Raises:
            ShardError: When the shard can't be read again or has changed.
        """


class CopyTask(Marked, Protocol):
    """What is made of shards that have been scored before."""

    def __call__(self) -> ShardStats:
        """Write it; when this returns, it is on disk and whole.

        Raises:
            ShardError: When a shard can't be read, or is not the one that was scored.
        """


@dataclass(frozen=True, kw_only=True)
class TableOutput:
    """The score table of a shard, which is its own commit mark."""

    url: str
    table: AnyPath

    @property
    def mark(self) -> AnyPath:
        """The table."""
        return self.table

    def committed(self, fingerprint: Fingerprint) -> ShardStats | None:
        """See :class:`Marked`."""
        if not self.table.is_file():
            return None
        scores = ShardScores.read(self.table)
        check_fingerprint(scores.fingerprint, fingerprint, f"{str(self.table)!r} is in the way: it")
        _check_source(self.table, scores.source, self.url)
        return _score_stats(scores) if scores.num_bytes == shard_num_bytes(self.url) else None

    def commit(self, scores: ShardScores) -> ShardStats:
        """See :class:`Output`."""
        with publish(self.table) as file:
            scores.write(file)
        return _score_stats(scores)


def _score_stats(scores: ShardScores) -> ShardStats:
    return shard_stats(select(scores, threshold=None).stats, scores)


def shard_stats(counts: FilterStats, scores: ShardScores, in_band: int = 0) -> ShardStats:
    """The counts, and what the score table says beside them."""
    return ShardStats(
        counts=counts,
        torn=scores.torn,
        truncated_captions=scores.num_truncated,
        band=scores.band,
        rechecked=scores.num_rechecked,
        in_band=in_band,
    )


@dataclass(frozen=True, kw_only=True)
class CopyOutput:
    """A tar with the kept samples of a shard, as they were.

    Attributes:
        url: The shard.
        files: Where they go.
        table: Where the shard's score table is, or goes when it is scored in this run; None when there is none.
        choice: What is kept.
        cutoff: What that means for this shard, when the choice needed all scores.
        layout: Where image and caption are.
    """

    url: str
    files: OutputFiles
    table: AnyPath | None
    choice: Choice
    cutoff: Cutoff | None
    layout: SampleLayout

    @property
    def mark(self) -> AnyPath:
        """``NAME_stats.json``."""
        return self.files.mark

    def __call__(self) -> ShardStats:
        """See :class:`CopyTask`."""
        if self.table is None:
            raise ShardError("there is no score table of it; score it first")
        scores = read_scores(self.table, self.url)
        return self._copy(scores, self.choice.num_in_band(scores, self.cutoff))

    def committed(self, fingerprint: Fingerprint) -> ShardStats | None:
        """See :class:`Marked`."""
        record = self.files.read_mark(self._settings, fingerprint)
        if record is None:
            return None
        _check_source(self.files.mark, record["source"], self.url)
        if record["num_bytes"] != shard_num_bytes(self.url) or record["cutoff"] != _cutoff_record(self.cutoff):
            self.files.forget()
            return None
        return stats_of(record)

    def commit(self, scores: ShardScores) -> ShardStats:
        """See :class:`Output`. The score table is written first."""
        assert self.table is not None
        TableOutput(url=self.url, table=self.table).commit(scores)
        return self._copy(scores)

    def _copy(self, scores: ShardScores, in_band: int = 0) -> ShardStats:
        selection = self.choice.select(scores, self.cutoff)
        stats = shard_stats(selection.stats, scores, in_band)
        samples = read_kept(self.url, scores, selection.keep, self.layout)
        record = {
            "source": public_url(self.url),
            "num_bytes": scores.num_bytes,
            **self._settings,
            "cutoff": _cutoff_record(self.cutoff),
            "fingerprint": dict(scores.fingerprint),
        }
        self.files.commit((member for sample in samples for member in sample.stored), stats, record)
        return stats

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.choice.settings, "samples_per_shard": None}


def _cutoff_record(cutoff: Cutoff | None) -> list[float | None] | None:
    if cutoff is None:
        return None
    return [cutoff.score if np.isfinite(cutoff.score) else None, cutoff.num_ties]  # JSON has no infinity


def read_kept(
    url: str, scores: ShardScores, keep: np.ndarray, layout: SampleLayout, *, to_end: bool = True
) -> Iterator[Sample]:
    """The kept samples of a shard, with all their members as they are stored.

    Args:
        url: The shard.
        scores: Its scores.
        keep: bool ``[num_samples]``.
        layout: Where image and caption are.
        to_end: See also that nothing else is behind the last of them; else the rest is not read.

    Raises:
        ShardError: When the shard can't be read, or is not the one that was scored.
    """
    keys = scores.keys
    last = -1 if to_end else int(np.flatnonzero(keep)[-1])
    wanted = frozenset(np.flatnonzero(keep).tolist())
    with open_shard(url) as shard:
        for item in read_samples(shard, layout, wanted=wanted.__contains__, to_copy=True):
            if isinstance(item, ShardEnd):
                if item.num_samples != len(keep):
                    raise ShardError(f"it holds {item.num_samples} samples, and {len(keep)} were scored")
                if item.torn != scores.torn:
                    raise ShardError("it changed between scoring and writing")
            elif item.problem is not None or item.key != keys[item.index]:
                raise ShardError(f"its sample {item.index} is {item.key!r}, and {keys[item.index]!r} was scored")
            else:
                yield item
                if item.index == last:
                    return


def _check_source(path: AnyPath, found: str, url: str) -> None:
    if found != public_url(url):
        raise ValueError(f"{str(path)!r} is in the way: it was made from {found!r}, not from {public_url(url)!r}")
