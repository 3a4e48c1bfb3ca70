"""What becomes of a shard: a score table, or the kept samples and a commit mark. Picklable, one per shard."""

import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clipfilter_wds.paths import AnyPath, num_bytes_of
from clipfilter_wds.rewrite.tally import ShardStats
from clipfilter_wds.samples import SampleLayout, read_samples
from clipfilter_wds.scores import Fingerprint, ShardScores, check_fingerprint, read_scores
from clipfilter_wds.selection import select
from clipfilter_wds.shards import open_shard, public_url, shard_num_bytes
from clipfilter_wds.types import DropReason, FilterStats, ShardEnd, ShardError
from clipfilter_wds.writer import TarWriter, publish, publish_json


class Output(Protocol):
    """The outcome of one shard. It is committed once; what is committed is never done again."""

    @property
    def url(self) -> str:
        """The shard."""

    def committed(self, fingerprint: Fingerprint) -> ShardStats | None:
        """What an earlier run committed for this shard, None if that is nothing or the shard has changed since.

        Raises:
            ValueError: When the earlier run had another model, other settings or another shard of this name.
            ShardError: When the shard can't be reached.
        """

    def commit(self, scores: ShardScores) -> ShardStats:
        """Write the outcome of the shard; when this returns, it is on disk and whole.

        Raises:
            ShardError: When the shard can't be read again or has changed.
        """


@dataclass(frozen=True, kw_only=True)
class TableOutput:
    """The score table of a shard, which is its own commit mark."""

    url: str
    table: AnyPath

    def committed(self, fingerprint: Fingerprint) -> ShardStats | None:
        """See :class:`Output`."""
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
    return _shard_stats(select(scores, threshold=None).stats, scores)


def _shard_stats(counts: FilterStats, scores: ShardScores) -> ShardStats:
    return ShardStats(
        counts=counts,
        torn=scores.torn,
        truncated_captions=scores.num_truncated,
        band=scores.band,
        rechecked=scores.num_rechecked,
    )


@dataclass(frozen=True, kw_only=True)
class CopyOutput:
    """``NAME.tar`` with the kept samples of a shard, and ``NAME_stats.json``, the commit mark.

    Attributes:
        url: The shard.
        folder: The output folder.
        name: The shard's name in it, without suffix.
        table: Where the shard's score table is, or goes when it is scored in this run; None when there is none.
        threshold: Keep a pair when ``clip(cosine, 0, 1)`` is at least this.
        layout: Where image and caption are.
    """

    url: str
    folder: AnyPath
    name: str
    table: AnyPath | None
    threshold: float
    layout: SampleLayout

    def __call__(self) -> ShardStats:
        """Copy what is kept of a shard that was scored before; otherwise as :meth:`commit`."""
        if self.table is None:
            raise ShardError("there is no score table of it; score it first")
        return self._copy(read_scores(self.table, self.url))

    def committed(self, fingerprint: Fingerprint) -> ShardStats | None:
        """See :class:`Output`."""
        path = self._stats
        if not path.is_file():
            return None
        record = _read_record(path)
        in_the_way = f"{str(path)!r} is in the way: it"
        check_fingerprint(record["fingerprint"], fingerprint, in_the_way)
        check_fingerprint({"threshold": record["threshold"]}, {"threshold": self.threshold}, in_the_way)
        _check_source(path, record["source"], self.url)
        is_whole = num_bytes_of(self._tar) == (record["tar_bytes"] if record["kept"] else None)
        if not is_whole or record["num_bytes"] != shard_num_bytes(self.url):
            path.unlink(missing_ok=True)  # the mark goes first: there is nothing whole that it could stand for
            return None
        dropped = {DropReason(reason): count for reason, count in record["dropped"].items()}
        return ShardStats(
            counts=FilterStats(seen=record["seen"], kept=record["kept"], dropped=dropped),
            torn=record["torn"],
            truncated_captions=record["truncated_captions"],
            band=record["band"],
            rechecked=record["rechecked"],
        )

    def commit(self, scores: ShardScores) -> ShardStats:
        """See :class:`Output`. The score table is written first."""
        assert self.table is not None
        TableOutput(url=self.url, table=self.table).commit(scores)
        return self._copy(scores)

    def _copy(self, scores: ShardScores) -> ShardStats:
        selection = select(scores, self.threshold)
        digest, tar_bytes = self._write_kept(scores, selection.keep)
        stats = _shard_stats(selection.stats, scores)
        publish_json(
            self._stats,
            {
                "shard": f"{self.name}.tar",
                "seen": stats.counts.seen,
                "kept": stats.counts.kept,
                "dropped": dict(stats.counts.dropped),
                "torn": stats.torn,
                "truncated_captions": stats.truncated_captions,
                "band": stats.band,
                "rechecked": stats.rechecked,
                "source": public_url(self.url),
                "num_bytes": scores.num_bytes,
                "threshold": self.threshold,
                "fingerprint": dict(scores.fingerprint),
                "sha256": digest,
                "tar_bytes": tar_bytes,
            },
        )
        return stats

    def _write_kept(self, scores: ShardScores, keep: np.ndarray) -> tuple[str | None, int]:
        path = self._tar
        if not keep.any():
            path.unlink(missing_ok=True)
            return None, 0
        with publish(path) as file:
            tar = TarWriter(file)
            copy_kept(self.url, scores, keep, tar, self.layout)
            return tar.finish(), file.tell()

    @property
    def _tar(self) -> AnyPath:
        return self.folder / f"{self.name}.tar"

    @property
    def _stats(self) -> AnyPath:
        return self.folder / f"{self.name}_stats.json"


def copy_kept(url: str, scores: ShardScores, keep: np.ndarray, tar: TarWriter, layout: SampleLayout) -> None:
    """Copy the members of the kept samples of a shard, as they are.

    Raises:
        ShardError: When the shard can't be read, or is not the one that was scored.
    """
    keys = scores.keys
    with open_shard(url) as shard:
        for item in read_samples(shard, layout, wanted=lambda index: index < len(keep) and bool(keep[index])):
            if isinstance(item, ShardEnd):
                if item.num_samples != len(keep):
                    raise ShardError(f"it holds {item.num_samples} samples, and {len(keep)} were scored")
                if item.torn != scores.torn:
                    raise ShardError("it changed between scoring and writing")
            elif item.problem is not None or item.key != keys[item.index]:
                raise ShardError(f"its sample {item.index} is {item.key!r}, and {keys[item.index]!r} was scored")
            else:
                for member in item.members:
                    tar.add(member)


def write_sizes(folder: AnyPath) -> None:
    """Write ``sizes.json``: how many samples each tar of the folder holds, earlier runs' tars included."""
    records = [_read_record(path) for path in folder.rglob("*_stats.json")]
    sizes = {record["shard"]: record["kept"] for record in records if record["kept"]}
    publish_json(folder / "sizes.json", dict(sorted(sizes.items())))


def _check_source(path: AnyPath, found: str, url: str) -> None:
    if found != public_url(url):
        raise ValueError(f"{str(path)!r} is in the way: it was made from {found!r}, not from {public_url(url)!r}")


def _read_record(path: AnyPath) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_bytes())
    if "fingerprint" not in record:
        raise ValueError(f"{str(path)!r} was not written by clipfilter-wds; choose an output folder of its own")
    return record
