"""Commits an output shard: the tar, then the mark that says what it holds."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.shards.tar_writer import TarWriter
from clipfilter_wds.storage.paths import AnyPath, num_bytes_of
from clipfilter_wds.storage.publish import publish, publish_json
from clipfilter_wds.types import DropReason, FilterStats, ShardError, StoredMember

Record = dict[str, Any]


class Marked(Protocol):
    """The outcome of one shard, which is committed once; what is committed is never done again. Picklable."""

    @property
    def url(self) -> str:
        """The shard."""

    @property
    def mark(self) -> AnyPath:
        """The file that is there when the outcome is."""

    def committed(self, fingerprint: Fingerprint) -> ShardStats | None:
        """What an earlier run committed for this shard, None if that is nothing or the shard has changed since.

        Raises:
            ValueError: When the earlier run had another model, other settings or another shard of this name.
            ShardError: When the shard can't be reached.
        """


@dataclass(frozen=True, kw_only=True)
class OutputFiles:
    """``NAME.tar``, absent where nothing is kept, and ``NAME_stats.json``."""

    folder: AnyPath
    name: str

    @property
    def tar(self) -> AnyPath:
        """The kept samples."""
        return self.folder / f"{self.name}.tar"

    @property
    def mark(self) -> AnyPath:
        """Written last: what it says is done."""
        return self.folder / f"{self.name}_stats.json"

    def read_mark(self, settings: Mapping[str, Any], fingerprint: Fingerprint) -> Record | None:
        """What an earlier run of the same settings has committed, None if that is nothing whole.

        Raises:
            ValueError: When it had other settings.
        """
        if not self.mark.is_file():
            return None
        record = read_record(self.mark)
        in_the_way = f"{str(self.mark)!r} is in the way: it"
        check_fingerprint(record["fingerprint"], fingerprint, in_the_way)
        check_fingerprint({name: record.get(name) for name in settings}, settings, in_the_way)
        if num_bytes_of(self.tar) != (record["tar_bytes"] if record["kept"] else None):
            self.forget()
            return None
        return record

    def forget(self) -> None:
        """Make nothing of what was committed; the files are done anew."""
        self.mark.unlink(missing_ok=True)  # the mark goes first: there is nothing whole that it could stand for

    def remove(self) -> None:
        """Delete both."""
        self.forget()
        self.tar.unlink(missing_ok=True)

    def commit(self, members: Iterable[StoredMember], stats: ShardStats, record: Record) -> None:
        """Write the tar and the mark; when this returns, they are on disk and whole."""
        if not stats.counts.kept:
            self.tar.unlink(missing_ok=True)
        digest, tar_bytes = self._write_tar(members) if stats.counts.kept else (None, 0)
        counted = {
            "shard": f"{self.name}.tar",
            "seen": stats.counts.seen,
            "kept": stats.counts.kept,
            "successes": stats.counts.kept,  # what img2dataset calls the samples in a tar
            "dropped": dict(stats.counts.dropped),
            "torn": stats.torn,
            "truncated_captions": stats.truncated_captions,
            "band": stats.band,
            "rechecked": stats.rechecked,
            "in_band": stats.in_band,
            "renamed_keys": stats.renamed,
        }
        publish_json(self.mark, {**counted, **record, "sha256": digest, "tar_bytes": tar_bytes})

    def _write_tar(self, members: Iterable[StoredMember]) -> tuple[str, int]:
        with publish(self.tar) as file:
            tar = TarWriter(file)
            for member in members:
                tar.copy(member)
            return tar.finish(), file.tell()


def stats_of(record: Record) -> ShardStats:
    """What a mark counts."""
    dropped = {DropReason(reason): count for reason, count in record["dropped"].items()}
    return ShardStats(
        counts=FilterStats(seen=record["seen"], kept=record["kept"], dropped=dropped),
        torn=record["torn"],
        truncated_captions=record["truncated_captions"],
        band=record["band"],
        rechecked=record["rechecked"],
        in_band=record["in_band"],
        renamed=record["renamed_keys"],
    )


def read_record(path: AnyPath) -> Record:
    """A commit mark.

    Raises:
        ValueError: When the file is none.
    """
    record: Record = json.loads(path.read_bytes())
    if "fingerprint" not in record:
        raise ValueError(f"{str(path)!r} was not written by clipfilter-wds; choose an output folder of its own")
    return record


def write_sizes(folder: AnyPath) -> None:
    """Write ``sizes.json``: how many samples each tar of the folder holds, earlier runs' tars included."""
    with ThreadPoolExecutor(max_workers=32, thread_name_prefix="clipfilter-marks") as pool:  # it may be a million
        sizes = dict(pool.map(_size_of, folder.rglob("*_stats.json")))
    publish_json(folder / "sizes.json", {shard: sizes[shard] for shard in sorted(sizes) if sizes[shard]})


def _size_of(mark: AnyPath) -> tuple[str, int]:
    record = read_record(mark)
    return record["shard"], record["kept"]


#: Marks that are read at once: each takes a storage a few round trips, and a run may have a million.
_NUM_READERS = 32


_NUM_AHEAD = 10_000


AnyOutput = TypeVar("AnyOutput", bound=Marked)


def read_marks(
    outputs: Sequence[AnyOutput], fingerprint: Fingerprint
) -> Iterator[tuple[AnyOutput, ShardStats | ShardError | None]]:
    """Per shard, in order: what was committed for it, None if nothing was, or why it can't be reached.

    Raises:
        ValueError: As ``Marked.committed``.
    """

    def read(output: AnyOutput) -> ShardStats | ShardError | None:
        try:
            return output.committed(fingerprint)
        except ShardError as error:
            return error

    with ThreadPoolExecutor(max_workers=_NUM_READERS, thread_name_prefix="clipfilter-marks") as pool:
        for start in range(0, len(outputs), _NUM_AHEAD):
            some = outputs[start : start + _NUM_AHEAD]
            yield from zip(some, pool.map(read, some), strict=True)
