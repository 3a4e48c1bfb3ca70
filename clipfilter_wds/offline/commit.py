"""Commits an output shard: the tar, then the mark that says what it holds."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.tar_writer import TarWriter
from clipfilter_wds.storage.paths import AnyPath, num_bytes_of
from clipfilter_wds.storage.publish import publish, publish_json
from clipfilter_wds.types import ShardError, StoredMember

Record = dict[str, Any]
T = TypeVar("T")
Answer = TypeVar("Answer")

#: Requests to the storage at a time: each takes a few round trips, and a run may have a million files.
_NUM_REQUESTS = 32
_NUM_AHEAD = 10_000

#: What to do about an output that is there and is not of this run.
CURE = "choose another folder, or delete what is there with --overwrite"


class Task(Protocol):
    """Makes one output, once: what is committed is not made again. Picklable."""

    @property
    def url(self) -> str:
        """The shard; or how the output is called when it fails."""

    @property
    def mark(self) -> AnyPath:
        """The file that appears last, when the output is whole."""

    @property
    def tar(self) -> AnyPath | None:
        """The file of the samples that are kept, which is there if any are; None when it makes none."""

    def committed(self) -> ShardStats | None:
        """What an earlier run has committed, None when that is nothing or the shard has changed since.

        Raises:
            ValueError: When the earlier run had another model, other settings or another shard of this name.
            ShardError: When the shard can't be reached.
        """


AnyTask = TypeVar("AnyTask", bound=Task)


def ask_storage(ask: Callable[[T], Answer], items: Sequence[T]) -> Iterator[tuple[T, Answer]]:
    """Each item with the answer, in order; many are asked about at a time."""
    with ThreadPoolExecutor(_NUM_REQUESTS, thread_name_prefix="clipfilter-storage") as pool:
        for start in range(0, len(items), _NUM_AHEAD):
            some = items[start : start + _NUM_AHEAD]
            yield from zip(some, pool.map(ask, some), strict=True)


def read_marks(tasks: Sequence[AnyTask]) -> Iterator[tuple[AnyTask, ShardStats | ShardError | None]]:
    """Each task with what was committed, None when that is nothing, or why its shard can't be reached.

    Raises:
        ValueError: As ``Task.committed``.
    """

    def read(task: AnyTask) -> ShardStats | ShardError | None:
        try:
            return task.committed()
        except ShardError as error:
            return error

    return ask_storage(read, tasks)


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
        """What an earlier run of the same settings has committed. What is not whole is forgotten.

        Raises:
            ValueError: When it had other settings.
        """
        record = self.find_mark(settings, fingerprint)
        if record is None and self.mark.is_file():
            self.forget()
        return record

    def find_mark(self, settings: Mapping[str, Any], fingerprint: Fingerprint) -> Record | None:
        """What an earlier run of the same settings has committed, None when that is nothing whole.

        Raises:
            ValueError: When it had other settings.
        """
        if not self.mark.is_file():
            return None
        try:
            record = read_record(self.mark)
        except FileNotFoundError:  # a run that does the same work at once is making it anew
            return None
        check_fingerprint(record["fingerprint"], fingerprint, repr(str(self.mark)), CURE)
        check_settings(self.mark, record, settings)
        is_whole = num_bytes_of(self.tar) == (record["tar_bytes"] if record["kept"] else None)
        return record if is_whole else None

    def stats_of(self, record: Record, **planned: Any) -> ShardStats | None:
        """What a mark counts that says what is planned. Another one is deleted, so that the output is made anew."""
        if {name: record[name] for name in planned} == planned:
            return ShardStats.from_record(record)
        self.forget()
        return None

    def forget(self) -> None:
        """Have the output made anew."""
        self.mark.unlink(missing_ok=True)  # the mark goes first: there is nothing whole that it could stand for

    def remove(self) -> None:
        """Delete both files."""
        self.forget()
        self.tar.unlink(missing_ok=True)

    def commit(self, members: Iterable[StoredMember], stats: ShardStats, record: Record) -> None:
        """Write the tar and the mark; when this returns, they are on disk and whole."""
        num_kept = stats.counts.kept
        if not num_kept:
            self.tar.unlink(missing_ok=True)
        digest, tar_bytes = self._write_tar(members) if num_kept else (None, 0)
        counted = stats.to_record()
        content = {
            "shard": f"{self.name}.tar",
            "seen": counted.pop("seen"),
            "kept": counted.pop("kept"),
            "successes": num_kept,  # what img2dataset calls the samples in a tar
            **counted,
            **record,
            "sha256": digest,
            "tar_bytes": tar_bytes,
        }
        publish_json(self.mark, content)

    def _write_tar(self, members: Iterable[StoredMember]) -> tuple[str, int]:
        with publish(self.tar) as file:
            tar = TarWriter(file)
            for member in members:
                tar.copy(member)
            return tar.finish(), file.tell()


def check_settings(mark: AnyPath, record: Record, settings: Mapping[str, Any]) -> None:
    """Refuse what a run of other settings has made.

    Raises:
        ValueError: Naming those that differ.
    """
    check_fingerprint({name: record.get(name) for name in settings}, settings, repr(str(mark)), CURE)


def check_source(path: AnyPath, found: str, url: str) -> None:
    """Refuse an output that was made from another shard.

    Raises:
        ValueError: Naming both.
    """
    if found != public_url(url):
        raise ValueError(f"{str(path)!r} was made from {found!r}, not from {public_url(url)!r}; {CURE}")


def read_record(path: AnyPath) -> Record:
    """A commit mark.

    Raises:
        ValueError: When the file is none.
    """
    record = find_record(path)
    if record is None:
        raise ValueError(f"{str(path)!r} was not written by clipfilter-wds; choose another folder")
    return record


def find_record(path: AnyPath) -> Record | None:
    """A commit mark; None when the file is of somebody else, as img2dataset's of that name are.

    Raises:
        ValueError: When nobody can tell, because it is damaged.
    """
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is no commit mark of clipfilter-wds: {error}; if it is a damaged one, delete it, and its "
            "shard is made anew"
        ) from None
    return record if isinstance(record, dict) and "fingerprint" in record else None


def write_sizes(folder: AnyPath, check: Callable[[AnyPath, Record], None]) -> None:
    """Write ``sizes.json``: how many samples each tar holds that this run or an earlier one has written there.

    Args:
        folder: The output.
        check: Called with each mark.
    """
    sizes = {}
    for mark, record in ask_storage(find_record, [*folder.rglob("*_stats.json")]):
        if record is not None:
            check(mark, record)
            sizes[record["shard"]] = record["kept"]
    publish_json(folder / "sizes.json", {shard: sizes[shard] for shard in sorted(sizes) if sizes[shard]})
