"""What becomes of a scored shard: a score table, and for a rewrite the kept samples and the commit mark."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipfilter_wds.samples import SampleLayout, read_samples
from clipfilter_wds.scores import Fingerprint, ShardScores, check_fingerprint
from clipfilter_wds.selection import select
from clipfilter_wds.shards import open_shard, public_url, shard_num_bytes
from clipfilter_wds.types import DropReason, FilterStats, ShardEnd, ShardError
from clipfilter_wds.writer import TarWriter, publish, publish_json


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """The outcome of one shard."""

    counts: FilterStats
    torn: bool
    truncated_captions: int


class Output(Protocol):
    """Where the outcome of shards goes. Shards are committed one by one; what is committed is never done again."""

    def committed(self, url: str, fingerprint: Fingerprint) -> ShardStats | None:
        """What an earlier run committed for this shard, None if that is nothing or the shard has changed since.

        Raises:
            ValueError: When the earlier run had another model, other settings or another shard of this name.
        """

    def commit(self, url: str, scores: ShardScores) -> ShardStats:
        """Write the outcome of a shard; when this returns, it is on disk and whole.

        Raises:
            ShardError: When the shard can't be read again or has changed.
        """

    def finish(self) -> None:
        """Write what describes the whole output."""


@dataclass(frozen=True, kw_only=True)
class ScoreOutput:
    """``DIR/00000.parquet`` per shard. The table is its own commit mark."""

    folder: Path
    names: Mapping[str, str]

    def committed(self, url: str, fingerprint: Fingerprint) -> ShardStats | None:
        """See :class:`Output`."""
        path = self._table(url)
        if not path.is_file():
            return None
        scores = ShardScores.read(path)
        check_fingerprint(scores.fingerprint, fingerprint, f"{str(path)!r} is in the way: it")
        _check_source(path, scores.source, url)
        return _score_stats(scores) if scores.num_bytes == shard_num_bytes(url) else None

    def commit(self, url: str, scores: ShardScores) -> ShardStats:
        """See :class:`Output`."""
        with publish(self._table(url)) as file:
            scores.write(file)
        return _score_stats(scores)

    def finish(self) -> None:
        """Nothing: the tables say it all."""

    def _table(self, url: str) -> Path:
        return self.folder / f"{self.names[url]}.parquet"


def _score_stats(scores: ShardScores) -> ShardStats:
    return ShardStats(
        counts=select(scores, threshold=None).stats, torn=scores.torn, truncated_captions=scores.num_truncated
    )


@dataclass(frozen=True, kw_only=True)
class RewriteOutput:
    """``DIR/00000.tar`` with the kept samples, ``_scores/00000.parquet``, and ``00000_stats.json``, the commit mark."""

    folder: Path
    names: Mapping[str, str]
    threshold: float
    layout: SampleLayout

    def committed(self, url: str, fingerprint: Fingerprint) -> ShardStats | None:
        """See :class:`Output`."""
        path = self._stats(url)
        if not path.is_file():
            return None
        record = _read_record(path)
        in_the_way = f"{str(path)!r} is in the way: it"
        check_fingerprint(record["fingerprint"], fingerprint, in_the_way)
        check_fingerprint({"threshold": record["threshold"]}, {"threshold": self.threshold}, in_the_way)
        _check_source(path, record["source"], url)
        tar = self._tar(url)
        is_whole = tar.is_file() and tar.stat().st_size == record["tar_bytes"] if record["kept"] else not tar.exists()
        if not is_whole or record["num_bytes"] != shard_num_bytes(url):
            path.unlink()  # the mark goes first: there is nothing whole that it could stand for
            return None
        dropped = {DropReason(reason): count for reason, count in record["dropped"].items()}
        return ShardStats(
            counts=FilterStats(seen=record["seen"], kept=record["kept"], dropped=dropped),
            torn=record["torn"],
            truncated_captions=record["truncated_captions"],
        )

    def commit(self, url: str, scores: ShardScores) -> ShardStats:
        """See :class:`Output`."""
        selection = select(scores, self.threshold)
        ScoreOutput(folder=self.folder / "_scores", names=self.names).commit(url, scores)
        digest, tar_bytes = self._write_kept(url, scores, selection.keep)
        stats = ShardStats(counts=selection.stats, torn=scores.torn, truncated_captions=scores.num_truncated)
        publish_json(
            self._stats(url),
            {
                "shard": f"{self.names[url]}.tar",
                "seen": stats.counts.seen,
                "kept": stats.counts.kept,
                "dropped": dict(stats.counts.dropped),
                "torn": stats.torn,
                "truncated_captions": stats.truncated_captions,
                "source": scores.source,
                "num_bytes": scores.num_bytes,
                "threshold": self.threshold,
                "fingerprint": dict(scores.fingerprint),
                "sha256": digest,
                "tar_bytes": tar_bytes,
            },
        )
        return stats

    def finish(self) -> None:
        """Write ``sizes.json``: how many samples each tar of the folder holds, earlier runs' tars included."""
        records = [_read_record(path) for path in sorted(self.folder.rglob("*_stats.json"))]
        publish_json(
            self.folder / "sizes.json", {record["shard"]: record["kept"] for record in records if record["kept"]}
        )

    def _write_kept(self, url: str, scores: ShardScores, keep: np.ndarray) -> tuple[str | None, int]:
        path = self._tar(url)
        if not keep.any():
            path.unlink(missing_ok=True)
            return None, 0
        with publish(path) as file:
            tar = TarWriter(file)
            copy_kept(url, scores, keep, tar, self.layout)
            return tar.finish(), file.tell()

    def _tar(self, url: str) -> Path:
        return self.folder / f"{self.names[url]}.tar"

    def _stats(self, url: str) -> Path:
        return self.folder / f"{self.names[url]}_stats.json"


def copy_kept(url: str, scores: ShardScores, keep: np.ndarray, tar: TarWriter, layout: SampleLayout) -> None:
    """Copy the members of the kept samples of a shard, as they are.

    Raises:
        ShardError: When the shard can't be read, or is no longer the one that was scored.
    """
    keys = scores.keys
    num_copied = 0
    with open_shard(url) as shard:
        for item in read_samples(shard, layout, wanted=lambda index: index < len(keep) and bool(keep[index])):
            if isinstance(item, ShardEnd):
                if (item.num_samples, item.torn, num_copied) != (len(keep), scores.torn, keep.sum()):
                    raise ShardError("it changed between scoring and writing")
            elif item.problem is not None or item.key != keys[item.index]:
                raise ShardError("it changed between scoring and writing")
            else:
                num_copied += 1
                for member in item.members:
                    tar.add(member)


def _check_source(path: Path, found: str, url: str) -> None:
    if found != public_url(url):
        raise ValueError(f"{str(path)!r} is in the way: it was made from {found!r}, not from {public_url(url)!r}")


def _read_record(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_bytes())
    if "fingerprint" not in record:
        raise ValueError(f"{str(path)!r} was not written by clipfilter-wds; choose an output folder of its own")
    return record
