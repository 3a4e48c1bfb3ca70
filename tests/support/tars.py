"""Makes tars in every format, and tells what must be read of them."""

import io
import re
import tarfile
from itertools import groupby

import pytest

from clipfilter_wds.types import DropReason, ShardEnd
from tests.support.toys import tar_bytes

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BLOCK = tarfile.BLOCKSIZE


# The sizes lie on, beside and far from the borders of blocks.
SIZES = [0, 1, 511, 512, 513, 1500]
END = bytes(2 * BLOCK)


def content(name: str, size: int) -> bytes:
    """Bytes of a member that occur in no other member, empty ones aside."""
    return (name.encode() * (size // len(name.encode()) + 1))[:size]


def shard_members(tar_format: str) -> list[tuple[str, bytes]]:
    """Five samples of jpg, txt and json, some with names that need extended headers."""
    long = "" if tar_format == "ustar" else "long-" * 30 + "ü/"
    folders = ["", "a/", long, "", long]
    names = [f"{folder}{key:04d}.{ext}" for key, folder in enumerate(folders) for ext in ("jpg", "txt", "json")]
    return [(name, content(name, SIZES[number % len(SIZES)])) for number, name in enumerate(names)]


class Shard:
    """A whole tar, what it should be read as, and where its parts lie."""

    def __init__(self, members: list[tuple[str, bytes]], tar_format: str) -> None:
        self.data = tar_bytes(members, format=FORMATS[tar_format])
        self.contents = dict(members)
        with tarfile.open(fileobj=io.BytesIO(self.data)) as tar:
            self.infos = tar.getmembers()
        self.samples = [
            (key, {info.name.removeprefix(key + "."): self.contents[info.name] for info in infos})
            for key, infos in groupby(self.infos, lambda info: key_of(info.name))
        ]
        self.begins = [next(info for info in self.infos if key_of(info.name) == key) for key, _ in self.samples]
        self.end = end_of(self.infos[-1])

    def untouched(self, positions: set[int]) -> dict[str, bytes]:
        """The members that have no header or data at these positions."""
        return {
            info.name: self.contents[info.name]
            for info in self.infos
            if not any(info.offset <= position < end_of(info) for position in positions)
        }


def key_of(name: str) -> str:
    return re.fullmatch(r"((?:.*/)?[^./]+)\..*", name)[1]


def end_of(info: tarfile.TarInfo) -> int:
    return info.offset_data + -(-info.size // BLOCK) * BLOCK


def plain(samples) -> list[tuple[str, dict[str, bytes]]]:
    return [(sample.key, {member.extension: member.data for member in sample.members}) for sample in samples]


def check_accounting(samples, end: ShardEnd) -> None:
    """All samples come out, in order, and only the last of a torn shard is torn."""
    assert [sample.index for sample in samples] == list(range(end.num_samples))
    torn = [sample.index for sample in samples if sample.problem is DropReason.TORN]
    assert torn == ([end.num_samples - 1] if end.torn and samples else [])
    assert not any(sample.members for sample in samples if sample.problem is not None)


SHARDS = {name: Shard(shard_members(name), name) for name in FORMATS}
each_format = pytest.mark.parametrize("tar_format", FORMATS)
PAIR_A, PAIR_B = [("a.jpg", b"1"), ("a.txt", b"2")], [("b.jpg", b"3"), ("b.txt", b"4")]
