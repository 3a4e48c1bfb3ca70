"""Splits shards among workers."""

from collections.abc import Sequence
from typing import NamedTuple


class ShardPart(NamedTuple):
    """One worker's share of a shard: every ``num_parts``-th block of samples, beginning with block ``part``."""

    url: str
    part: int = 0
    num_parts: int = 1


def split_by_worker(urls: Sequence[str], worker: int, num_workers: int) -> list[ShardPart]:
    """What ``worker`` of ``num_workers`` reads, such that all have work and every block is read exactly once.

    Workers take turns at whole shards. Where fewer shards than workers are left, several workers share each of them.
    """
    num_whole = len(urls) - len(urls) % num_workers
    parts = [ShardPart(url) for url in urls[worker:num_whole:num_workers]]
    if rest := urls[num_whole:]:
        sharers = range(worker % len(rest), num_workers, len(rest))
        parts.append(ShardPart(rest[worker % len(rest)], sharers.index(worker), len(sharers)))
    return parts
