"""Groups tar members into samples; finds torn and unsorted shards."""

import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

from clipfilter_wds.shards.file_type import describe_file
from clipfilter_wds.shards.found import LINK, FoundMembers
from clipfilter_wds.shards.open import DamagedStreamError, OpenShard, open_shard
from clipfilter_wds.shards.split import ShardPart
from clipfilter_wds.shards.tar_reader import TAR_DAMAGE, TarEntry, TarStream, stored_member
from clipfilter_wds.types import DropReason, Member, Sample, ShardEnd, ShardError, StoredMember

T = TypeVar("T")

#: Extensions of members that are looked at as the image, best first.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2", "avif", "jfif")

_EXTENSION = re.compile(r"[^\s:;/]+")
_KEY_AND_EXTENSION = re.compile(r"(?!__[^/]*__(?:$|/))((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLayout:
    """Which members of a sample are the image and the caption.

    An extension is all that follows the first dot of a member's name: that of ``a/0.input.jpg`` is ``input.jpg``.

    Attributes:
        caption: Extension of the member that holds the caption (``txt``), or ``json:FIELD`` for a field of the
            sample's ``json`` member, which may be a list of captions; ``json:meta.caption`` is one in another. Several
            of these, separated by commas, are several captions of the same image.
        image: Extension of the member that holds the image, or several, separated by commas: the first that a sample
            has is looked at. None for the usual ones, :data:`IMAGE_EXTENSIONS`.
        max_member_bytes: A sample with a larger member is dropped as ``member_too_large``.
        max_text_bytes: Of a larger caption, this much is read; a larger ``json`` is not looked into, and a sample whose
            caption is in one is dropped as ``text_too_large``.
        others: Extensions of members that are read too; None for all.

    Raises:
        ValueError: When ``caption`` names no extension or no field, ``image`` no extension, or both the same.
    """

    caption: str = "txt"
    image: str | None = None
    max_member_bytes: int = 1 << 28
    max_text_bytes: int = 1 << 22
    others: tuple[str, ...] | None = ()

    def __post_init__(self) -> None:
        if not all(extension and field != "" for extension, field in self.caption_sources):
            raise ValueError(f"caption is {self.caption!r}; name a member (txt) or a JSON field (json:caption)")
        if not all(_EXTENSION.fullmatch(extension) for extension in self.image_extensions):
            raise ValueError(f"image is {self.image!r}; name extensions, separated by commas (input.jpg, or png,jpg)")
        if both := self.caption_extensions.intersection(self.image_extensions):
            raise ValueError(f"caption and image are both {both.pop()!r}; name two members of a sample")

    @classmethod
    def from_fingerprint(cls, fingerprint: Mapping[str, Any]) -> Self:
        """The layout that scores of this fingerprint were made with."""
        return cls(**{field.name: fingerprint[field.name] for field in fields(cls) if field.name in fingerprint})

    @property
    def caption_sources(self) -> list[tuple[str, str | None]]:
        """Where captions are: a member's extension, and its JSON field or None when the whole member is the caption."""
        sources = (source.strip().partition(":") for source in self.caption.split(","))
        return [(extension.lower().lstrip("."), field if colon else None) for extension, colon, field in sources]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on in this class: what is as usual is left out, where it came later. JSON-ready."""
        usual = SampleLayout()
        later = {name: getattr(self, name) for name in ("image", "max_text_bytes")}
        changed = {name: value for name, value in later.items() if value != getattr(usual, name)}
        return {"caption": self.caption, "max_member_bytes": self.max_member_bytes, **changed}

    @property
    def image_extensions(self) -> tuple[str, ...]:
        """Extensions of members that are looked at as the image, best first."""
        if self.image is None:
            return IMAGE_EXTENSIONS
        return tuple(extension.strip().lower().lstrip(".") for extension in self.image.split(","))

    @property
    def text_extensions(self) -> set[str]:
        """Extensions of the members that are read as text: of captions, and the one that may hold a uid."""
        return {"json", *self.caption_extensions}

    @property
    def caption_extensions(self) -> set[str]:
        """Extensions of the members that hold captions."""
        return {extension for extension, _ in self.caption_sources}


def read_part(
    part: ShardPart, read: Callable[[OpenShard], Iterator[T | ShardEnd]], *, allow_pipe: bool = False
) -> Iterator[T | ShardEnd]:
    """Open the shard of a worker's part and yield what is read of it; its :class:`ShardEnd` once the shard is closed.

    Only then, since closing a shard can still tell that reading it failed.

    Args:
        part: Whose shard is read.
        read: Open shard -> the part's samples and the end, as :func:`read_samples` gives them.
        allow_pipe: Read ``pipe:`` URLs, which run shell commands.

    Raises:
        ShardError: When the shard can't be opened or closed; and from ``read``.
    """
    end = None
    with open_shard(part.url, allow_pipe=allow_pipe) as shard:
        for item in read(shard):
            if isinstance(item, ShardEnd):
                end = item
            else:
                yield item
    if end is not None:
        yield end


def read_samples(
    shard: OpenShard,
    layout: SampleLayout,
    *,
    wanted: Callable[[int], bool] = lambda index: True,
    pair_only: bool = False,
    to_copy: bool = False,
) -> Iterator[Sample | ShardEnd]:
    """Yield the wanted samples of a shard in order, then its :class:`ShardEnd`.

    A sample is a run of adjacent members with one key, within one archive: a shard may be several that were joined
    (``cat a.tar b.tar``), which come one after another. The last one of a torn shard is not known to be whole and has
    the problem ``torn``, even when the cut lies between two members. Links, devices and folders are passed over, as are
    names that have no key or no extension and webdataset's ``__meta__`` names.

    Args:
        shard: An open shard, read once from front to back.
        layout: Where image and caption are.
        wanted: By index, whether to read and yield a sample. The others are only counted.
        pair_only: Read only image, caption and json members, of several images the best, and the layout's ``others``.
            Of a text member, no more than the layout's ``max_text_bytes`` and one byte.
        to_copy: Read all members as they stand in the tar, to ``stored`` instead of ``members``.

    Raises:
        ShardError: When the file is no tar archive, reading fails, or the tar is unsorted: a key comes back and one of
            its groups lacks image or caption.
    """
    groups = _Groups(layout, wanted, pair_only, to_copy)
    tar = TarStream(shard.stream, layout.max_member_bytes, groups.pass_over)
    torn = True
    try:
        for entry in tar:
            if name := _KEY_AND_EXTENSION.fullmatch(entry.name):
                if (done := groups.begin_member(tar.archive, name[1], name[2].lower())) is not None:
                    yield done
                groups.read_member(tar, entry, name[2].lower())
            elif "." not in entry.name:
                groups.found.add("")
        torn = not tar.has_ended()
    except TAR_DAMAGE as error:
        # Damage ends the archive here, as torn, whatever it looks like to tarfile.
        if tar.failed_at_first_header:
            found = describe_file(tar.beginning)
            raise ShardError(f"it is not a tar archive{f', but {found}' if found else f' ({error})'}") from error
        if isinstance(error, DamagedStreamError) and not tar.num_read:
            raise ShardError(f"it is damaged at its very beginning and can't be unpacked ({error})") from error
    if (last := groups.finish(torn)) is not None:
        yield last
    identity = shard.identity._replace(signature=tar.signature)
    yield ShardEnd(num_samples=groups.num_samples, torn=torn, members=groups.found.counts, **identity._asdict())


class _Groups:
    """Gathers members into samples and knows which keys have come by."""

    def __init__(self, layout: SampleLayout, wanted: Callable[[int], bool], pair_only: bool, to_copy: bool) -> None:
        self._layout, self._wanted, self._pair_only, self._to_copy = layout, wanted, pair_only, to_copy
        self._caption_extensions = layout.caption_extensions
        self._archive = 0
        # Of text members, how much is read; and the json members of which the first is looked into, whoever wants it.
        self._max_bytes = dict.fromkeys(layout.text_extensions if pair_only else (), layout.max_text_bytes + 1)
        self._to_open = {extension for extension, field in layout.caption_sources if field is not None} | {"json"}
        self._to_open &= self._max_bytes.keys()
        self._image_ranks = {extension: rank for rank, extension in enumerate(layout.image_extensions)}
        self._whole_by_key: dict[str, bool] = {}
        self._key: str | None = None
        self._extensions: set[str] = set()
        self._members: list[Member] = []
        self._stored: list[StoredMember] = []
        self._problem: DropReason | None = None
        self._is_wanted = False
        self._best_rank = 0
        self.found = FoundMembers()
        self.num_samples = 0

    def pass_over(self, name: str) -> None:
        """Note a link."""
        if parts := _KEY_AND_EXTENSION.fullmatch(name):
            self.found.add(LINK + parts[2].lower())

    def begin_member(self, archive: int, key: str, extension: str) -> Sample | None:
        """Note a member's archive and name; returns the sample before it, if this member begins another one."""
        self.found.add(extension)
        if key == self._key and extension not in self._extensions and archive == self._archive:
            self._extensions.add(extension)
            return None
        done = self._close()
        if archive != self._archive:
            self._archive, self._whole_by_key = archive, {}
        self._key, self._extensions, self._problem = key, {extension}, None
        self._members, self._stored, self._best_rank = [], [], len(self._image_ranks)
        self._is_wanted = self._wanted(self.num_samples)
        self.num_samples += 1
        return done

    def read_member(self, tar: TarStream, entry: TarEntry, extension: str) -> None:
        """Read the bytes of the member that was begun, if anybody wants them.

        Raises:
            tarfile.ReadError: When it is damaged. Whether that is found must not depend on who wants to read it, or
                the workers that share a shard would not agree on what is in it.
        """
        if not entry.is_possible:
            raise tarfile.ReadError(f"{entry.name!r} declares an impossible size")
        if entry.size > self._layout.max_member_bytes:
            self._problem = DropReason.MEMBER_TOO_LARGE
        elif self._is_wanted and self._to_copy:
            self._stored.append(tar.read_stored(entry))
        elif self._is_wanted and (not self._pair_only or self._makes_pair(extension) or self._is_other(extension)):
            data = self._read(tar, entry, extension)
            self._members.append(Member(name=entry.name, extension=extension, data=data))
        elif entry.sparse is not None or extension in self._to_open:
            self._read(tar, entry, extension)

    def _read(self, tar: TarStream, entry: TarEntry, extension: str) -> bytes:
        data = tar.read(entry, self._max_bytes.get(extension))
        if extension in self._to_open:
            self._to_open.remove(extension)
            self.found.add_fields(extension, data)
        return data

    def _makes_pair(self, extension: str) -> bool:
        """Whether a member is needed to score the sample, or to know it by its uid. Worse images are let go."""
        if extension in self._max_bytes:
            return True
        rank = self._image_ranks.get(extension, self._best_rank)
        if rank >= self._best_rank:
            return False
        if self._best_rank < len(self._image_ranks):
            self._members = [
                one for one in self._members if one.extension in self._max_bytes or self._is_other(one.extension)
            ]
        self._best_rank = rank
        return True

    def _is_other(self, extension: str) -> bool:
        return self._layout.others is None or extension in self._layout.others

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
        key = self._key.encode("utf-8", errors="backslashreplace").decode()
        index = self.num_samples - 1
        if self._problem:
            return Sample(key=key, index=index, problem=self._problem)
        return Sample(key=key, index=index, members=tuple(self._members), stored=tuple(self._stored))

    def _check_sorted(self, key: str) -> None:
        """A key may come back with a second whole sample; parts of a sample that lie apart can't be paired."""
        has_caption = not self._extensions.isdisjoint(self._caption_extensions)
        whole = has_caption and not self._extensions.isdisjoint(self._image_ranks)
        if key not in self._whole_by_key:
            self._whole_by_key[key] = whole
        elif not (whole and self._whole_by_key[key]):
            raise ShardError(
                f"the tar is not sorted: members of {key!r} lie apart or appear twice, so images and captions can't be "
                "paired. Write it again with each sample's members side by side, for example with `tar --sort=name`"
            )


def with_suffix(member: StoredMember, suffix: str) -> StoredMember:
    """The member under its sample's key with something behind it: ``a/b.seg.png`` with ``_1`` is ``a/b_1.seg.png``."""
    parts = _KEY_AND_EXTENSION.fullmatch(member.name)
    assert parts is not None
    data = member.window[member.data : member.data + member.size]
    return stored_member(f"{parts[1]}{suffix}.{parts[2]}", data)
