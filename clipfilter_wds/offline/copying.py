"""Copies the kept samples of a shard to a tar, as they are stored."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from typing import Any, Self

import numpy as np

from clipfilter_wds.offline.commit import OutputFiles, Record, check_source
from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.duplicate_keys import suffixes_of_neighbours
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.preprocess.json_columns import column_name
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.groups import GroupCutoffs
from clipfilter_wds.scores.selection import AnyCutoff, Choice
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.found import LINK
from clipfilter_wds.shards.identity import check_identity, is_scored
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples, with_suffix
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.types import DropReason, FilterStats, Sample, ShardEnd, ShardError, ShardIdentity, StoredMember


@dataclass(frozen=True, kw_only=True)
class CopyOptions:
    """What all output shards of a run have in common. Picklable.

    Attributes:
        choice: What is kept.
        layout: Where image and caption are.
        fingerprint: What the scores depend on beside the shards.
        samples_per_shard: How many samples an output shard holds; None when each input shard has its own.
    """

    choice: Choice
    layout: SampleLayout
    fingerprint: Fingerprint
    samples_per_shard: int | None

    @classmethod
    def of(cls, config: RewriteConfig, fingerprint: Fingerprint) -> Self:
        """What a run copies, from scores that depend on what the fingerprint says."""
        return cls(
            choice=config.choice,
            layout=SampleLayout.from_fingerprint(fingerprint),
            fingerprint=fingerprint,
            samples_per_shard=config.samples_per_shard,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What a commit mark says of them."""
        return {**self.choice.settings, "samples_per_shard": self.samples_per_shard}


@dataclass(frozen=True, kw_only=True)
class CopyTask:
    """Makes a tar of the kept samples of a shard that has been scored.

    Attributes:
        url: The shard.
        table: Its score table; None when there is none.
        cutoff: What the choice keeps of this shard, when that took the scores of all.
        files: Where the samples go.
        options: What is kept.
    """

    url: str
    table: AnyPath | None
    cutoff: AnyCutoff | None
    files: OutputFiles
    options: CopyOptions

    @property
    def mark(self) -> AnyPath:
        """See ``Task``."""
        return self.files.mark

    @property
    def tar(self) -> AnyPath:
        """See ``Task``."""
        return self.files.tar

    def committed(self) -> ShardStats | None:
        """See ``Task``."""
        record = self.files.read_mark(self.options.settings, self.options.fingerprint)
        if record is None:
            return None
        check_source(self.files.mark, record["source"], self.url)
        if not is_scored(self.url, ShardIdentity.from_record(record), self.files.mark):
            self.files.forget()
            return None
        if not self._chooses_as(record):
            self.files.forget()
            return None
        return self.files.stats_of(record, **self._plan)

    def is_done(self) -> bool:
        """Whether an earlier run has committed it; changes nothing.

        Raises:
            ValueError, ShardError: As :meth:`committed`.
        """
        record = self.files.find_mark(self.options.settings, self.options.fingerprint)
        if record is None:
            return False
        check_source(self.files.mark, record["source"], self.url)
        is_same = is_scored(self.url, ShardIdentity.from_record(record), self.files.mark)
        return is_same and record["cutoff"] == self._plan["cutoff"] and self._chooses_as(record)

    def _chooses_as(self, record: Record) -> bool:
        """Whether the columns that decide hold what they did, as far as mark and table tell."""
        if record.get("selection") is None or self.table is None:
            return True
        with suppress(ValueError):  # it is gone or damaged, and nothing is made of it
            selection = self.options.choice.select(ShardScores.read(self.table), self.cutoff)
            return bool(selection.digest() == record["selection"])
        return True

    @property
    def _plan(self) -> dict[str, Any]:
        """What the commit mark says of it."""
        return {"cutoff": _cutoff_record(self.cutoff)}

    def __call__(self) -> ShardStats:
        """Copy; when this returns, the output is on disk and whole.

        Raises:
            ShardError: When the shard can't be read, or is not the one that was scored.
            ValueError: When a run of other settings has made the output meanwhile.
        """
        if self.table is None:
            raise ShardError("there is no score table of it; score it first")
        scores, choice = ShardScores.read(self.table), self.options.choice
        selection = choice.select(scores, self.cutoff)
        identity = check_identity(self.url, scores.metadata.identity, self.table, is_read_next=selection.stats.kept > 0)
        kept_keys = list(compress(scores.keys, selection.keep))
        suffixes = suffixes_of_neighbours(kept_keys, scores.keys)
        stats = shard_stats(selection.stats, scores, choice.num_in_band(scores, self.cutoff))
        stats += ShardStats(renamed_keys=len(suffixes))
        samples = read_kept(self.url, scores, selection.keep, self.options.layout)
        record = {
            "source": public_url(self.url),
            **identity._asdict(),
            **self.options.settings,
            "cutoff": _cutoff_record(self.cutoff),
            "selection": selection.digest() if choice.uses_further_columns else None,
            "batch_size": scores.metadata.batch_size,
            "fingerprint": dict(scores.metadata.fingerprint),
        }
        # Another run, of other settings, may have begun to write to the same folder since.
        self.files.find_mark(self.options.settings, self.options.fingerprint)
        self.files.commit(stored_members(samples, suffixes), stats, record)
        return stats


def stored_members(samples: Iterable[Sample], suffixes: Mapping[int, str]) -> Iterator[StoredMember]:
    """The members of samples, in order; those of some, by place, under the sample's key with a suffix."""
    for place, sample in enumerate(samples):
        suffix = suffixes.get(place)
        yield from (member if suffix is None else with_suffix(member, suffix) for member in sample.stored)


def _cutoff_record(cutoff: AnyCutoff | None) -> Any:
    if cutoff is None:
        return None
    if isinstance(cutoff, GroupCutoffs):
        return {group: _cutoff_record(one) for group, one in cutoff.by_group.items()}
    return [cutoff.score if np.isfinite(cutoff.score) else None, cutoff.num_ties]  # JSON has no infinity


def shard_stats(counts: FilterStats, scores: ShardScores, in_band: int = 0) -> ShardStats:
    """The counts, and what the shard's score table says beside them."""
    return ShardStats(
        counts=counts,
        torn=scores.metadata.torn,
        truncated_captions=scores.num_truncated,
        band=scores.metadata.band,
        rechecked=scores.metadata.rechecked,
        in_band=in_band,
        members=_telling(scores),
        null_columns=_null_columns(scores),
        torn_names=(scores.metadata.shard,) if scores.metadata.torn else (),
    )


def _null_columns(scores: ShardScores) -> dict[str, int]:
    """The further columns that are null in all samples, and how many these are."""
    num_samples, table = scores.table.num_rows, scores.table
    names = {source: column_name(source) for source in scores.metadata.columns} if num_samples else {}
    return {source: num_samples for source, name in names.items() if table[name].null_count == num_samples}


def _telling(scores: ShardScores) -> dict[str, int]:
    """Of what a shard's members are called, what tells why samples lack an image or a caption, or there are none."""
    members, dropped = scores.metadata.members, scores.dropped
    num_lacking = dropped.get(DropReason.MISSING_IMAGE, 0) + dropped.get(DropReason.MISSING_CAPTION, 0)
    if 2 * num_lacking > scores.table.num_rows or not scores.table.num_rows:
        return dict(members)
    return {name: count for name, count in members.items() if num_lacking and name.startswith(LINK)}


def read_kept(
    url: str, scores: ShardScores, keep: np.ndarray, layout: SampleLayout, *, to_end: bool = True
) -> Iterator[Sample]:
    """The kept samples of a shard, with all their members as they are stored.

    Args:
        url: The shard.
        scores: Its scores.
        keep: bool ``[num_samples]``.
        layout: Where image and caption are.
        to_end: Read the shard to its end, and check that it ends where the scores do; else stop behind the last of
            these samples.

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
                if item.torn != scores.metadata.torn or item.identity.matches(scores.metadata.identity) is False:
                    raise ShardError("it changed between scoring and writing")
            elif item.problem is not None or item.key != keys[item.index]:
                raise ShardError(f"its sample {item.index} is {item.key!r}, and {keys[item.index]!r} was scored")
            else:
                yield item
                if item.index == last:
                    return
