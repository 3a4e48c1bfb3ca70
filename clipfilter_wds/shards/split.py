"""Splits shards among workers."""

from collections.abc import Sequence
from typing import NamedTuple

# --- who reads what ---


class ShardPart(NamedTuple):
    """One worker's share of a shard: every ``num_parts``-th block of samples, starting with block ``part``."""

    url: str
    part: int = 0
    num_parts: int = 1


def split_by_worker(urls: Sequence[str], worker: int, num_workers: int) -> list[ShardPart]:
    """What ``worker`` of ``num_workers`` reads, so that all of them have work and every block is read exactly once.

    Whole shards in turn; the shards that are left when there are fewer than workers are each shared by several.
    """
    num_whole = len(urls) - len(urls) % num_workers
    parts = [ShardPart(url) for url in urls[worker:num_whole:num_workers]]
    if rest := urls[num_whole:]:
        sharers = range(worker % len(rest), num_workers, len(rest))
        parts.append(ShardPart(rest[worker % len(rest)], sharers.index(worker), len(sharers)))
    return parts
