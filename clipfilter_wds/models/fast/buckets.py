"""Chooses the few shapes that batches are computed in, so that each can be launched as a CUDA graph."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

#: Rows that are computed together. In between, batches are filled up: by less than half, from 64 rows on.
ROW_COUNTS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)

#: Tokens that captions are filled up to, if the text tower takes so many.
_LENGTHS = (16, 24, 32, 48, 77, 128, 256)


class Group(NamedTuple):
    """Captions that are computed together.

    Attributes:
        rows: int64 ``[n]``: which captions.
        length: What their tokens are filled up to.
    """

    rows: np.ndarray
    length: int


def row_count(num_rows: int) -> int:
    """What a batch of so many rows is filled up to; the most rows of a batch, where it has to be split."""
    return next((count for count in ROW_COUNTS if count >= num_rows), ROW_COUNTS[-1])


def caption_lengths(max_length: int, *, pads_to_max: bool) -> tuple[int, ...]:
    """What captions are filled up to, for a text tower that takes ``max_length`` tokens, or takes them only."""
    shorter = () if pads_to_max else tuple(length for length in _LENGTHS if length < max_length)
    return (*shorter, max_length)


def group_by_length(used: np.ndarray, lengths: Sequence[int]) -> list[Group]:
    """Group captions so that each is in one group, which is long enough for it; the longest come first.

    Rows that would only fill up a group are given to the longest of the shorter captions.

    Args:
        used: int64 ``[N]``: how many tokens of each caption are needed; at most the last of ``lengths``.
        lengths: Ascending.
    """
    order = np.argsort(-used, kind="stable")
    filled = np.asarray(lengths)[np.searchsorted(lengths, used[order])]
    groups, start = [], 0
    while start < len(order):
        num_rows = row_count(int((filled[start:] == filled[start]).sum()))
        groups.append(Group(order[start : start + num_rows], int(filled[start])))
        start += num_rows
    return groups
