"""Combines several scores of the same samples into one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from clipfilter_wds.scores.fraction import Cutoff, find_cutoffs


def weighted_sum(scores: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """``sum_a weights[a] * scores[a]`` of float32 ``[N]`` each, in float64: float32 ``[N]``."""
    total: np.ndarray = np.asarray(weights) @ np.stack(scores).astype(np.float64)
    return total.astype(np.float32)


def product(scores: Sequence[np.ndarray]) -> np.ndarray:
    """The product of float32 ``[N]`` each, in float64: float32 ``[N]``."""
    multiplied: np.ndarray = np.prod(np.stack(scores).astype(np.float64), axis=0)
    return multiplied.astype(np.float32)


class Ranks:
    """Ranks scores among all of a run: by the share of them that is below, from 0 to 1. Holds four bytes per score.

    Args:
        scores: Of all the run's samples, shard after shard: float32 ``[N]`` each, all of them numbers.
    """

    def __init__(self, scores: Iterable[np.ndarray]) -> None:
        self._sorted = np.concatenate([np.zeros(0, dtype=np.float32), *scores])
        self._sorted.sort()

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """The ranks of some of the scores, float32 ``[n]``: float64 ``[n]``.

        Of m equal scores with b below them, each has the mean of b, b + 1, ..., b + m - 1.
        """
        below = np.searchsorted(self._sorted, scores, side="left")
        last = np.searchsorted(self._sorted, scores, side="right") - 1
        ranks: np.ndarray = (below + last) / (2 * max(1, len(self._sorted)))
        return ranks


def min_rank(scores: Sequence[np.ndarray], ranks: Sequence[Ranks]) -> np.ndarray:
    """The lowest of each sample's ranks, float32 ``[N]``, by scores of several kinds, float32 ``[N]`` each."""
    ranked = [rank(each) for rank, each in zip(ranks, scores, strict=True)]
    lowest: np.ndarray = np.min(ranked, axis=0).astype(np.float32)
    return lowest


def find_stages(read: Callable[[], Iterable[Sequence[np.ndarray]]], fractions: Sequence[float]) -> list[list[Cutoff]]:
    """Per shard, the cutoff of each stage: the best by the first scores are left, of these the best by the second, ...

    Args:
        read: Reads the scores of one shard after another: float32 ``[N]`` per stage.
        fractions: Of all scores of the run, none above the one before it.
    """
    shards: list[list[Cutoff]] = [[] for _ in read()]
    total = num_left = sum(len(scores[0]) for scores in read())
    for stage, fraction in enumerate(fractions):
        num_kept = round(fraction * total)
        cutoffs = find_cutoffs(partial(_left, read, shards, stage), num_kept / max(1, num_left))
        num_left = num_kept
        shards = [[*before, cutoff] for before, cutoff in zip(shards, cutoffs, strict=True)]
    return shards


def passes_stages(scores: Sequence[np.ndarray], cutoffs: Sequence[Cutoff]) -> np.ndarray:
    """Whether each sample of a shard is left by the cutoffs: bool ``[N]``, given its scores, float32 ``[N]`` each."""
    left = np.arange(len(scores[0]))
    for each, cutoff in zip(scores, cutoffs, strict=False):
        left = left[cutoff.keeps(each[left])]
    return np.isin(np.arange(len(scores[0])), left)


def _left(
    read: Callable[[], Iterable[Sequence[np.ndarray]]], shards: Sequence[Sequence[Cutoff]], stage: int
) -> Iterator[np.ndarray]:
    """Per shard, a stage's scores of what the stages before it leave."""
    for scores, cutoffs in zip(read(), shards, strict=True):
        yield scores[stage][passes_stages(scores, cutoffs)]
