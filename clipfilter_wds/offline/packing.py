"""Packs the kept samples of many shards into output shards of equal size."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clipfilter_wds.offline.commit import CURE, OutputFiles, read_record
from clipfilter_wds.offline.copying import CopyOptions, CopyTask, read_kept, shard_stats, stored_members
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.selection import AnyCutoff
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.identity import check_identity
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.types import Sample, ShardError, ShardIdentity


@dataclass(frozen=True, kw_only=True)
class Source:
    """Consecutive samples of a shard.

    Attributes:
        url: The shard.
        table: Its score table.
        identity: What tells it from another shard.
        cutoff: What is kept of the shard, when the choice needed all scores.
        start: Index of the first sample.
        stop: Index behind the last one.
        num_kept: How many of these samples are kept.
        to_end: Whether they are the last ones of the shard.
        selection: A digest of which are kept, where columns of the table decide; else None.
    """

    url: str
    table: AnyPath
    identity: ShardIdentity
    cutoff: AnyCutoff | None
    start: int
    stop: int
    num_kept: int
    to_end: bool
    selection: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What the commit mark says of it."""
        # That it was copied makes no other plan, nor that it was scored before there were signatures.
        found = {**self.identity._replace(storage_version=None)._asdict(), "selection": self.selection}
        known = {name: value for name, value in found.items() if value is not None}
        samples = {"start": self.start, "stop": self.stop, "kept": self.num_kept}
        return {"source": public_url(self.url), **known, **samples}


@dataclass(frozen=True, kw_only=True)
class PackTask:
    """Makes a tar of kept samples of consecutive shards that have been scored, in their order.

    It accounts for all samples of its sources, so that what all outputs have seen is what all shards hold.

    Attributes:
        sources: Where the samples come from.
        suffixes: By place in the output, what is put behind keys that came before in the run.
        files: Where the samples go.
        options: What is kept.
    """

    sources: tuple[Source, ...]
    suffixes: Mapping[int, str]
    files: OutputFiles
    options: CopyOptions

    @property
    def url(self) -> str:
        """See ``Task``."""
        return str(self.files.tar)

    @property
    def mark(self) -> AnyPath:
        """See ``Task``."""
        return self.files.mark

    @property
    def tar(self) -> AnyPath:
        """See ``Task``."""
        return self.files.tar

    def committed(self) -> ShardStats | None:
        """See ``Task``. What was made to another plan is made anew."""
        record = self.files.read_mark(self.options.settings, self.options.fingerprint)
        return None if record is None else self.files.stats_of(record, **self._plan)

    def is_done(self) -> bool:
        """Whether an earlier run has committed it; changes nothing.

        Raises:
            ValueError: As :meth:`committed`.
        """
        record = self.files.find_mark(self.options.settings, self.options.fingerprint)
        return record is not None and {name: record[name] for name in self._plan} == self._plan

    def __call__(self) -> ShardStats:
        """Copy; when this returns, the output is on disk and whole. Each source is read once, no further than needed.

        Raises:
            ShardError: When a source can't be read, or is not the one that was scored.
            ValueError: When a run of other settings has made the output meanwhile.
        """
        stats, fingerprint = self._count()
        record = {**self.options.settings, **self._plan, "fingerprint": dict(fingerprint)}
        # Another run, of other settings, may have begun to write to the same folder since.
        self.files.find_mark(self.options.settings, self.options.fingerprint)
        self.files.commit(stored_members(self._samples(), self.suffixes), stats, record)
        return stats

    def _count(self) -> tuple[ShardStats, Fingerprint]:
        """Samples are counted where they are; what is known of a whole shard, in the output that holds its end."""
        stats, choice = ShardStats(renamed_keys=len(self.suffixes)), self.options.choice
        fingerprint = self.options.fingerprint
        for source in self.sources:
            scores = ShardScores.read(source.table)
            check_identity(source.url, source.identity, source.table, is_read_next=True)
            found = choice.select(scores, source.cutoff).stats_between(source.start, source.stop)
            if found.kept != source.num_kept:
                raise ShardError(f"{str(source.table)!r} has changed since the run was planned; start it again")
            if source.to_end:
                stats += shard_stats(found, scores, choice.num_in_band(scores, source.cutoff))
            else:
                stats += ShardStats(counts=found)
            fingerprint = scores.metadata.fingerprint
        return stats, fingerprint

    def _samples(self) -> Iterator[Sample]:
        for source in self.sources:
            if not source.num_kept:
                continue
            scores = ShardScores.read(source.table)
            keep = self.options.choice.select(scores, source.cutoff).keep
            keep[: source.start] = keep[source.stop :] = False
            try:
                yield from read_kept(source.url, scores, keep, self.options.layout, to_end=source.to_end)
            except ShardError as error:
                raise ShardError(f"{public_url(source.url)}: {error}") from error

    @property
    def _plan(self) -> dict[str, Any]:
        """What the commit mark says of it."""
        return {
            "sources": [source.record for source in self.sources],
            "suffixes": {str(place): suffix for place, suffix in self.suffixes.items()},
        }


#: Makes an output shard of shards that have been scored.
AnyCopyTask = CopyTask | PackTask


def check_covered(outputs: Iterable[Iterable[Source]], counts: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a plan that does not take every sample of every shard exactly once, in order.

    Args:
        outputs: Per output, where its samples come from.
        counts: Per shard, how many samples it holds and how many of them are kept.

    Raises:
        ValueError: When samples would be lost or come twice.
    """
    taken = dict.fromkeys(counts, (0, 0))
    for source in (source for sources in outputs for source in sources):
        stop, num_kept = taken[source.url]
        if source.start != stop or source.stop < stop:
            raise ValueError(
                f"the plan loses samples or takes them twice: of {public_url(source.url)!r} it takes samples "
                f"{source.start} to {source.stop} behind the first {stop}"
            )
        taken[source.url] = (source.stop, num_kept + source.num_kept)
    for url, count in counts.items():
        if taken[url] != count:
            raise ValueError(
                f"the plan loses samples or takes them twice: of {public_url(url)!r}, which holds {count[0]} samples "
                f"of which {count[1]} are kept, it takes {taken[url][0]} of which {taken[url][1]} are kept"
            )


def left_over(folder: AnyPath, tasks: Iterable[PackTask], samples_per_shard: int) -> list[OutputFiles]:
    """What an earlier plan has packed beyond these tasks.

    Raises:
        ValueError: When the folder holds shards that were not packed, or to another size.
    """
    planned, beyond = {str(task.files.tar) for task in tasks}, []
    for mark in folder.rglob("*_stats.json"):
        record = read_record(mark)
        found = {"samples_per_shard": record.get("samples_per_shard")}
        check_fingerprint(found, {"samples_per_shard": samples_per_shard}, repr(str(mark)), CURE)
        files = OutputFiles(folder=folder, name=record["shard"].removesuffix(".tar"))
        if str(files.tar) not in planned:
            beyond.append(files)
    return beyond
