"""Refuses score tables that are not of the same shard and samples."""

from pathlib import Path

from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores

_CURE = "both must be made of the same shards"


def check_same_shard(path: Path, found: ScoreMetadata, other: Path, expected: ScoreMetadata) -> None:
    """Refuse a table of another shard than that of another table, as far as what they say of themselves tells.

    That is the size and, where both know it, the signature (see ``ShardIdentity``). The storage versions can't tell:
    those of a shard and its copy differ.

    Args:
        path: Where the table is.
        found: What it says.
        other: Where the other one is.
        expected: What that one says.

    Raises:
        ValueError: When the shards differ.
    """
    if found.num_samples != expected.num_samples or _differ(found.num_bytes, expected.num_bytes, unknown=-1):
        raise ValueError(
            f"{str(path)!r} and {str(other)!r} are of different shards: {found.shard!r} with {found.num_samples} "
            f"samples in {found.num_bytes} bytes, and {expected.shard!r} with {expected.num_samples} in "
            f"{expected.num_bytes}; {_CURE}"
        )
    if _differ(found.signature, expected.signature, unknown=None):
        raise ValueError(
            f"{str(path)!r} and {str(other)!r} are of different shards: the members of {found.shard!r} had other "
            f"names, sizes or times than those of {expected.shard!r}; {_CURE}"
        )


def check_same_samples(path: Path, found: ShardScores, other: Path, expected: ShardScores) -> None:
    """Refuse a table of another shard, or of other keys.

    Raises:
        ValueError: When they differ.
    """
    check_same_shard(path, found.metadata, other, expected.metadata)
    if found.table["key"].equals(expected.table["key"]):
        return
    there, here = next(keys for keys in zip(found.keys, expected.keys, strict=True) if keys[0] != keys[1])
    raise ValueError(
        f"{str(path)!r} holds other samples than {str(other)!r}: key {there!r} there, {here!r} here; {_CURE}"
    )


def _differ(one: object, other: object, *, unknown: object) -> bool:
    return unknown not in (one, other) and one != other
