"""Kept samples of many shards -> output shards of equal size."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clipfilter_wds.offline.commit import OutputFiles, read_record, stats_of
from clipfilter_wds.offline.copying import CopyTask, read_kept, shard_stats
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.fraction import Cutoff
from clipfilter_wds.scores.selection import Choice
from clipfilter_wds.scores.table import read_scores
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.samples import SampleLayout, with_suffix
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.types import FilterStats, Sample, ShardError, StoredMember


@dataclass(frozen=True, kw_only=True)
class Source:
    """Consecutive samples of a shard.

    Attributes:
        url: The shard.
        table: Its score table.
        num_bytes: Its size as stored.
        cutoff: What is kept of the shard, when the choice needed all scores.
        start: Index of the first sample.
        stop: Index behind the last one.
        num_kept: How many of these samples are kept.
        to_end: Whether they are the last ones of the shard.
    """

    url: str
    table: AnyPath
    num_bytes: int
    cutoff: Cutoff | None
    start: int
    stop: int
    num_kept: int
    to_end: bool

    @property
    def record(self) -> dict[str, Any]:
        """What the commit mark says of it."""
        samples = {"start": self.start, "stop": self.stop, "kept": self.num_kept}
        return {"source": public_url(self.url), "num_bytes": self.num_bytes, **samples}


@dataclass(frozen=True, kw_only=True)
class PackedOutput:
    """A tar of kept samples from consecutive shards, in their order.

    It accounts for all samples of its sources, so that what all outputs have seen is what all shards hold.

    Attributes:
        files: Where they go.
        sources: Where they come from.
        suffixes: By place in the output, what is put behind keys that came before in the run.
        choice: What is kept.
        samples_per_shard: How many an output holds; only the last one holds fewer.
        layout: Where image and caption are.
    """

    files: OutputFiles
    sources: tuple[Source, ...]
    suffixes: Mapping[int, str]
    choice: Choice
    samples_per_shard: int
    layout: SampleLayout

    @property
    def url(self) -> str:
        """What it is called when it fails."""
        return str(self.files.tar)

    @property
    def mark(self) -> AnyPath:
        """What says that it is done."""
        return self.files.mark

    def committed(self, fingerprint: Fingerprint) -> ShardStats | None:
        """See ``Marked``. Made to another plan, it is made anew."""
        record = self.files.read_mark(self._settings, fingerprint)
        if record is None:
            return None
        if record["sources"] != self._sources or record["suffixes"] != self._suffixes:
            self.files.forget()
            return None
        return stats_of(record)

    def __call__(self) -> ShardStats:
        """See ``CopyTask``. Each source is read once, no further than needed."""
        stats, fingerprint = self._count()
        record = {
            **self._settings,
            "sources": self._sources,
            "suffixes": self._suffixes,
            "fingerprint": dict(fingerprint),
        }
        self.files.commit(self._members(), stats, record)
        return stats

    def _count(self) -> tuple[ShardStats, Fingerprint]:
        """Samples are counted where they are; what is known of a whole shard, in the output that holds its end."""
        counts, ends, fingerprint = FilterStats(), [], {}
        for source in self.sources:
            scores = read_scores(source.table, source.url)
            found = self.choice.select(scores, source.cutoff).stats_between(source.start, source.stop)
            if found.kept != source.num_kept:
                raise ShardError(f"{str(source.table)!r} has changed since the run was planned; start it again")
            counts, fingerprint = counts + found, dict(scores.fingerprint)
            if source.to_end:
                ends.append(shard_stats(found, scores, self.choice.num_in_band(scores, source.cutoff)))
        stats = ShardStats(
            counts=counts,
            torn=sum(end.torn for end in ends),
            truncated_captions=sum(end.truncated_captions for end in ends),
            band=max((end.band for end in ends), default=0.0),
            rechecked=sum(end.rechecked for end in ends),
            in_band=sum(end.in_band for end in ends),
            renamed=len(self.suffixes),
        )
        return stats, fingerprint

    def _members(self) -> Iterator[StoredMember]:
        for place, sample in enumerate(self._samples()):
            suffix = self.suffixes.get(place)
            yield from (member if suffix is None else with_suffix(member, suffix) for member in sample.stored)

    def _samples(self) -> Iterator[Sample]:
        for source in self.sources:
            if not source.num_kept:
                continue
            scores = read_scores(source.table, source.url)
            keep = self.choice.select(scores, source.cutoff).keep
            keep[: source.start] = keep[source.stop :] = False
            try:
                yield from read_kept(source.url, scores, keep, self.layout, to_end=source.to_end)
            except ShardError as error:
                raise ShardError(f"{public_url(source.url)}: {error}") from error

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.choice.settings, "samples_per_shard": self.samples_per_shard}

    @property
    def _sources(self) -> list[dict[str, Any]]:
        return [source.record for source in self.sources]

    @property
    def _suffixes(self) -> dict[str, str]:
        return {str(place): suffix for place, suffix in self.suffixes.items()}


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
                f"the plan loses samples or takes them twice: of {public_url(source.url)!r} it goes on with samples "
                f"{source.start} to {source.stop} behind the first {stop}"
            )
        taken[source.url] = (source.stop, num_kept + source.num_kept)
    for url, count in counts.items():
        if taken[url] != count:
            raise ValueError(
                f"the plan loses samples or takes them twice: of {public_url(url)!r}, which holds {count[0]} samples "
                f"of which {count[1]} are kept, it takes {taken[url][0]} of which {taken[url][1]} are kept"
            )


def left_over(folder: AnyPath, outputs: Iterable[CopyTask], samples_per_shard: int) -> list[OutputFiles]:
    """What an earlier plan has packed beyond these outputs.

    Raises:
        ValueError: When the folder holds shards that were not packed, or to another size.
    """
    planned, beyond = {output.url for output in outputs}, []
    for mark in folder.rglob("*_stats.json"):
        record = read_record(mark)
        found = {"samples_per_shard": record.get("samples_per_shard")}
        check_fingerprint(found, {"samples_per_shard": samples_per_shard}, f"{str(mark)!r} is in the way: it")
        files = OutputFiles(folder=folder, name=record["shard"].removesuffix(".tar"))
        if str(files.tar) not in planned:
            beyond.append(files)
    return beyond
