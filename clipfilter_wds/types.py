"""Defines the types that pass from one stage to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Self


class DropReason(StrEnum):
    """Why a sample was dropped. Every sample that is seen is either kept or has exactly one reason."""

    BELOW_THRESHOLD = "below_threshold"
    BLANK_CAPTION = "blank_caption"
    MISSING_CAPTION = "missing_caption"
    MISSING_IMAGE = "missing_image"
    UNREADABLE_IMAGE = "unreadable_image"
    IMAGE_TOO_LARGE = "image_too_large"
    MEMBER_TOO_LARGE = "member_too_large"
    TORN = "torn"
    NOT_FINITE = "not_finite"
    DECODER_CRASH = "decoder_crash"
    NOT_IN_SUBSET = "not_in_subset"
    SEVERAL_IMAGES = "several_images"
    TEXT_TOO_LARGE = "text_too_large"
    NOT_SELECTED = "not_selected"
    NEAR_DUPLICATE = "near_duplicate"

    def __repr__(self) -> str:
        return repr(self.value)


#: What stands for a reason in an int8 array, and for none.
REASON_CODES = {reason: code for code, reason in enumerate(DropReason)}
NO_REASON = -1


class ShardError(Exception):
    """A shard can't be used at all; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of a sample: its full name in the tar, its extension (after the key, lower case) and its bytes."""

    name: str
    extension: str
    data: bytes


class StoredMember(NamedTuple):
    """One file of a sample as it is stored in a tar, to be copied to another.

    Attributes:
        name: Its full name.
        size: Bytes of data.
        window: A part of the tar that holds it, and maybe other members.
        start: Where its headers begin in ``window``.
        data: Where its data begins there.
        stop: Where its padding ends there.
    """

    name: str
    size: int
    window: bytes
    start: int
    data: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Adjacent members of one shard that share a key.

    Attributes:
        key: The members' common name up to the first dot of the base name, folders included (webdataset's ``__key__``);
            bytes that are not UTF-8 are escaped.
        index: Position of the sample in its shard, counting from 0 and counting unusable samples too.
        members: In the order of the tar. Empty when ``problem`` is set.
        stored: Takes the place of ``members`` when the sample was read to be copied.
        problem: Why the sample can't be used, where the tar alone tells.
    """

    key: str
    index: int
    members: tuple[Member, ...] = ()
    stored: tuple[StoredMember, ...] = ()
    problem: DropReason | None = None


class ShardIdentity(NamedTuple):
    """What tells a shard from another one that had or will have its name.

    Attributes:
        num_bytes: Its size as stored (compressed, if it is), -1 when the storage doesn't tell.
        storage_version: Its ETag or time of change, whatever the storage tells; None when that is nothing.
        signature: A hash of all headers of the tar: names, sizes and times of its members. None when it is not known.
    """

    num_bytes: int = -1
    storage_version: str | None = None
    signature: str | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """What a JSON object says that has these names among its own; the first ones had ``num_bytes`` only."""
        return cls(record["num_bytes"], record.get("storage_version"), record.get("signature"))

    def matches(self, scored: "ShardIdentity") -> bool | None:
        """Whether this is the shard that was scored; None when it takes this one's signature to tell."""
        if -1 not in (self.num_bytes, scored.num_bytes) and self.num_bytes != scored.num_bytes:
            return False
        if self.signature is not None and scored.signature is not None:
            return self.signature == scored.signature
        if self.storage_version == scored.storage_version:
            return True
        return scored.storage_version is None if scored.signature is None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEnd:
    """What reading a shard to its end has found. Always the last thing that a shard yields.

    Attributes:
        num_samples: How many samples the shard holds, unusable ones included.
        torn: Whether the archive is damaged or cut: no end-of-archive mark follows its members.
        num_bytes: See :class:`ShardIdentity`.
        storage_version: Likewise.
        signature: Likewise.
        members: What its members are called, and how many are; see ``shards/found.py``.
    """

    num_samples: int
    torn: bool
    num_bytes: int
    storage_version: str | None = field(default=None, compare=False)
    signature: str | None = None
    members: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def identity(self) -> ShardIdentity:
        """What tells the shard from another one."""
        return ShardIdentity(self.num_bytes, self.storage_version, self.signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterStats:
    """Counts whose accounting closes: ``seen == kept + sum(dropped.values())``.

    ``seen`` is counted where samples are read, ``kept`` and ``dropped`` where it is decided, so that a sample lost on
    the way is an error and not a silent difference.

    Raises:
        ValueError: When the accounting doesn't close.
    """

    seen: int = 0
    kept: int = 0
    dropped: Mapping[DropReason, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seen != self.kept + sum(self.dropped.values()):
            raise ValueError(
                f"samples were lost or counted twice: seen {self.seen}, kept {self.kept}, dropped {dict(self.dropped)}"
            )

    def __add__(self, other: "FilterStats") -> "FilterStats":
        reasons = [reason for reason in DropReason if reason in self.dropped or reason in other.dropped]
        return FilterStats(
            seen=self.seen + other.seen,
            kept=self.kept + other.kept,
            dropped={reason: self.dropped.get(reason, 0) + other.dropped.get(reason, 0) for reason in reasons},
        )

    @property
    def keep_rate(self) -> float:
        """Share of the seen samples that were kept, 0.0 when none was seen."""
        return self.kept / self.seen if self.seen else 0.0


class UnusableError(Exception):
    """A sample can't be scored.

    Args:
        reason: Why.
    """

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A sample's row of the score table, without the score."""

    key: str
    index: int
    reason: DropReason | None = None
    num_tokens: int = 0
    truncated: bool = False
    width: int = 0
    height: int = 0
    uid: bytes | None = None
