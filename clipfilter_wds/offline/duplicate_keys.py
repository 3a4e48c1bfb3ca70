"""Finds keys that would come twice into one output, and gives them suffixes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count

import numpy as np

#: Reads the keys of all kept samples, one shard after another.
ReadKeys = Callable[[], Iterable[Sequence[str]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Suffixes:
    """What is put behind keys that came before.

    Attributes:
        places: Which of the kept samples, counted over the whole run; sorted int64 ``[N]``.
        numbers: How often each of their keys came before; int64 ``[N]``.
        separator: Stands between key and number.
    """

    places: np.ndarray
    numbers: np.ndarray
    separator: str

    def between(self, start: int, stop: int) -> dict[int, str]:
        """The suffixes of the kept samples ``start <= place < stop``, by their place behind ``start``."""
        first, last = np.searchsorted(self.places, [start, stop])
        places = (self.places[first:last] - start).tolist()
        numbers = self.numbers[first:last].tolist()
        return {place: f"{self.separator}{number}" for place, number in zip(places, numbers, strict=True)}


def find_suffixes(read: ReadKeys) -> Suffixes:
    """Number the samples whose key has come before, so that all keys differ.

    Keys are compared by 64 bits of their hash: 8 bytes per sample, and three times that while they are sorted. Two keys
    with equal hashes are next to impossible; the second would get a suffix that it does not need.
    """
    hashes = np.fromiter(_hashes(key for keys in read() for key in keys), dtype=np.uint64)
    places, numbers = _repeats(hashes)
    hashes.sort()
    for length in count(1):
        suffixes = Suffixes(places=places, numbers=numbers, separator="_" * length)
        if not any(_is_among(hashes, names) for names in _new_names(read, suffixes)):
            return suffixes
    raise AssertionError


def suffixes_of_neighbours(keys: Sequence[str], taken: Iterable[str]) -> dict[int, str]:
    """Suffixes for samples of one key that would stand side by side in a tar, where readers take them for one sample.

    Args:
        keys: Of the samples, in the order of the tar.
        taken: Keys that must not be made.

    Returns:
        By place among ``keys``, what is put behind the key; the first of several alike keeps its own.
    """
    numbers: dict[int, int] = {}
    for place in range(1, len(keys)):
        if keys[place] == keys[place - 1]:
            numbers[place] = numbers.get(place - 1, 0) + 1
    if not numbers:
        return {}
    names = set(taken)
    for length in count(1):
        suffixes = {place: f"{'_' * length}{number}" for place, number in numbers.items()}
        if names.isdisjoint(keys[place] + suffix for place, suffix in suffixes.items()):
            return suffixes
    raise AssertionError


def _hashes(keys: Iterable[str]) -> Iterator[int]:
    return (int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()) for key in keys)


def _repeats(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a value has come before, in order, and how often."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    numbers = np.arange(len(order))
    numbers -= np.maximum.accumulate(np.where(is_first, numbers, 0))
    places, numbers = order[~is_first], numbers[~is_first]
    in_order = np.argsort(places)
    return places[in_order], numbers[in_order]


def _new_names(read: ReadKeys, suffixes: Suffixes) -> Iterator[list[str]]:
    """Per shard, what the repeated keys are called."""
    if not len(suffixes.places):
        return
    start = 0
    for keys in read():
        yield [keys[place] + suffix for place, suffix in suffixes.between(start, start + len(keys)).items()]
        start += len(keys)


def _is_among(ordered: np.ndarray, names: list[str]) -> bool:
    hashes = np.fromiter(_hashes(names), dtype=np.uint64)
    at = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    return bool((ordered[at] == hashes).any())
