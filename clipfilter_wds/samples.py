"""One tar stream -> its samples. Grouping never crosses the shard; torn and unsorted shards are found here."""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from clipfilter_wds.shards import DamagedStreamError, OpenShard
from clipfilter_wds.types import DropReason, Member, Sample, ShardEnd, ShardError

#: Extensions of members that are looked at as the image, best first.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2", "avif")

_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_READ_BYTES = 1 << 20
_END_MARK = bytes(tarfile.BLOCKSIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLayout:
    """Which members of a sample are the image and the caption.

    Attributes:
        caption: Extension of the member that holds the caption (``txt``), or ``json:FIELD`` for a field of the
            sample's ``json`` member, which may be a list of captions. Several of these, separated by commas, are
            several captions of the same image.
        max_member_bytes: A sample with a larger member is dropped as ``member_too_large``.

    Raises:
        ValueError: When ``caption`` names no extension or no field.
    """

    caption: str = "txt"
    max_member_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        if not all(extension and field != "" for extension, field in self.caption_sources):
            raise ValueError(f"caption is {self.caption!r}; name a member (txt) or a JSON field (json:caption)")

    @property
    def caption_sources(self) -> list[tuple[str, str | None]]:
        """Where captions are: a member's extension, and its JSON field or None when the whole member is the caption."""
        sources = (source.strip().partition(":") for source in self.caption.split(","))
        return [(extension.lower().lstrip("."), field if colon else None) for extension, colon, field in sources]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on in this class. JSON-ready."""
        return {"caption": self.caption, "max_member_bytes": self.max_member_bytes}

    def is_pair_member(self, extension: str) -> bool:
        """Whether a member with this extension is needed to score a sample, or to know it by its uid."""
        return extension == "json" or extension in IMAGE_EXTENSIONS or self.is_caption_member(extension)

    def is_caption_member(self, extension: str) -> bool:
        """Whether a member with this extension holds a caption."""
        return any(extension == source for source, _ in self.caption_sources)


def read_samples(
    shard: OpenShard,
    layout: SampleLayout,
    *,
    wanted: Callable[[int], bool] = lambda index: True,
    pair_only: bool = False,
) -> Iterator[Sample | ShardEnd]:
    """Yield the wanted samples of a shard in order, then its :class:`ShardEnd`.

    A sample is a run of adjacent members with one key. The last one of a torn shard is not known to be whole and has
    the problem ``torn``, even when the cut lies between two members. Links, devices and folders are passed over, as are
    names that have no key or no extension and webdataset's ``__meta__`` names.

    Args:
        shard: An open shard, read once from front to back.
        layout: Where image and caption are.
        wanted: By index, whether to read and yield a sample. The others are only counted.
        pair_only: Read only image, caption and json members, not the others.

    Raises:
        ShardError: When the file is no tar archive, reading fails, or the tar is unsorted: a key comes back and one of
            its groups lacks image or caption.
    """
    reader = _ForwardReader(shard.stream, layout.max_member_bytes)
    groups = _Groups(layout, wanted, pair_only)
    torn = True
    try:
        archive = tarfile.TarFile(fileobj=reader, mode="r", errors="surrogateescape")  # type: ignore[arg-type]  # all that reading needs
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every header, which would grow with the shard
            if info.isreg() and (name := _KEY_AND_EXTENSION.fullmatch(info.name)) and not _META.match(info.name):
                if (done := groups.begin_member(name[1], name[2].lower())) is not None:
                    yield done
                groups.read_member(archive, info, name[2].lower())
        torn = not (reader.at_end_mark and reader.only_zeros_follow())
    except (tarfile.TarError, DamagedStreamError, ValueError, LookupError, OverflowError, RecursionError) as error:
        # Damage ends the archive here, as torn, whatever it looks like to tarfile.
        if reader.failed_at_first_header:
            raise ShardError(f"it is not a tar archive ({error})") from error
        if isinstance(error, DamagedStreamError) and not reader.tell():
            raise ShardError(f"it is damaged at its very beginning and can't be unpacked ({error})") from error
    if (last := groups.finish(torn)) is not None:
        yield last
    yield ShardEnd(num_samples=groups.num_samples, torn=torn, num_bytes=shard.num_bytes)


class _Groups:
    """Gathers members into samples and knows which keys have come by."""

    def __init__(self, layout: SampleLayout, wanted: Callable[[int], bool], pair_only: bool) -> None:
        self._layout, self._wanted, self._pair_only = layout, wanted, pair_only
        self._whole_by_key: dict[str, bool] = {}
        self._key: str | None = None
        self._extensions: set[str] = set()
        self._members: list[Member] = []
        self._problem: DropReason | None = None
        self._is_wanted = False
        self.num_samples = 0

    def begin_member(self, key: str, extension: str) -> Sample | None:
        """Note a member's name; returns the sample before it, if this member begins another one."""
        if key == self._key and extension not in self._extensions:
            self._extensions.add(extension)
            return None
        done = self._close()
        self._key, self._extensions, self._members, self._problem = key, {extension}, [], None
        self._is_wanted = self._wanted(self.num_samples)
        self.num_samples += 1
        return done

    def read_member(self, archive: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> None:
        """Read the bytes of the member that was begun, if anybody wants them.

        Raises:
            tarfile.ReadError: When it is damaged. Whether that is found must not depend on who wants to read it, or
                the workers that share a shard would not agree on what is in it.
        """
        if info.size < 0 or (not info.issparse() and info.offset_data + info.size > archive.offset):
            raise tarfile.ReadError(f"{info.name!r} declares an impossible size")
        if info.size > self._layout.max_member_bytes:
            self._problem = DropReason.MEMBER_TOO_LARGE
        elif self._is_wanted and (not self._pair_only or self._layout.is_pair_member(extension)):
            self._members.append(Member(name=info.name, extension=extension, data=_read_data(archive, info)))
        elif info.issparse():
            _read_data(archive, info)

    def finish(self, torn: bool) -> Sample | None:
        """The last sample, which is not known to be whole if the shard is torn."""
        if torn:
            self._problem = DropReason.TORN
        return self._close()

    def _close(self) -> Sample | None:
        if self._key is None:
            return None
        if self._problem is not DropReason.TORN:
            self._check_sorted(self._key)
        if not self._is_wanted:
            return None
        members = () if self._problem else tuple(self._members)
        key = self._key.encode("utf-8", errors="backslashreplace").decode()
        return Sample(key=key, index=self.num_samples - 1, members=members, problem=self._problem)

    def _check_sorted(self, key: str) -> None:
        """A key may come back with a second whole sample; parts of a sample that lie apart can't be paired."""
        has_caption = any(map(self._layout.is_caption_member, self._extensions))
        whole = has_caption and not self._extensions.isdisjoint(IMAGE_EXTENSIONS)
        if key not in self._whole_by_key:
            self._whole_by_key[key] = whole
        elif not (whole and self._whole_by_key[key]):
            raise ShardError(
                f"the tar is not sorted: members of {key!r} lie apart or appear twice, so images and captions can't be "
                "paired. Write it again with each sample's members side by side, for example with `tar --sort=name`"
            )


def with_suffix(member: Member, suffix: str) -> Member:
    """The member under its sample's key with something behind it: ``a/b.seg.png`` with ``_1`` is ``a/b_1.seg.png``."""
    parts = _KEY_AND_EXTENSION.fullmatch(member.name)
    assert parts is not None
    return replace(member, name=f"{parts[1]}{suffix}.{parts[2]}")


def _read_data(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    reader = archive.fileobj if not info.issparse() else archive.extractfile(info)
    data: bytes = reader.read(info.size)  # type: ignore[union-attr]  # both are there for a regular member
    if len(data) < info.size:
        raise tarfile.ReadError(f"{info.name!r} is cut")
    return data


class _ForwardReader:
    """The part of a file that tarfile needs, over a stream that can't go back."""

    def __init__(self, stream: BinaryIO, max_read_bytes: int) -> None:
        self._stream, self._max_read_bytes, self._position = stream, max(max_read_bytes, _READ_BYTES), 0
        self.at_end_mark = False
        self._short = False

    @property
    def failed_at_first_header(self) -> bool:
        """Whether reading stopped at a first block that is there but is no header. An empty file is torn instead."""
        return 0 < self._position < tarfile.BLOCKSIZE or (self._position == tarfile.BLOCKSIZE and not self._short)

    def only_zeros_follow(self) -> bool:
        """Whether nothing but padding is left. A zeroed header in mid-shard looks like the end, but is none."""
        while piece := self._stream.read(_READ_BYTES):
            if piece.count(0) < len(piece):
                return False
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a member has a negative size")
        while self._position < position and self.read(min(position - self._position, _READ_BYTES)):
            pass

    def read(self, size: int) -> bytes:
        # A header may declare far more bytes than there are, so memory is only taken for what arrives.
        if not 0 <= size <= self._max_read_bytes:
            raise tarfile.ReadError(f"a header declares {size} bytes")
        pieces = []
        while size > 0 and (piece := self._stream.read(min(size, _READ_BYTES))):
            pieces.append(piece)
            size -= len(piece)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._short = size > 0
        self._position += len(data)
        self.at_end_mark = data == _END_MARK
        return data
