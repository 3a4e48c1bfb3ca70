"""Chooses a sample of a run's rows that depends neither on the order of the shards nor on who reads them."""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

#: A row that the sample does not hold.
NOT_SAMPLED = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSample:
    """Rows of a run, those of the smallest hashes, in the order of the hashes.

    Attributes:
        shards: Per row, the number of its shard in the order in which they were added: int32 ``[M]``.
        indices: Per row, its index in the shard: int32 ``[M]``.
    """

    shards: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.shards)

    def of_shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The places in the sample that a shard's rows have, int64 ``[m]``, and their indices in it, int32 ``[m]``."""
        places = np.flatnonzero(self.shards == number)
        return places, self.indices[places]

    def places_in(self, number: int, num_rows: int) -> np.ndarray:
        """Per row of a shard, its place in the sample or ``NOT_SAMPLED``: int64 ``[num_rows]``."""
        places = np.full(num_rows, NOT_SAMPLED, dtype=np.int64)
        sampled, indices = self.of_shard(number)
        places[indices] = sampled
        return places


class RowSampler:
    """Keeps the rows of the smallest ``hash(seed, shard, index)``. Memory is 32 bytes per row of the sample.

    Args:
        size: How many rows to keep; all, if there are fewer.
        seed: Another one chooses other rows.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed, self._num_shards = size, seed, 0
        self._hashes = np.zeros(0, dtype=np.uint64)
        self._shards = np.zeros(0, dtype=np.int32)
        self._indices = np.zeros(0, dtype=np.int32)

    def add(self, name: str, indices: np.ndarray) -> None:
        """Add the next shard.

        Args:
            name: What it is called, without the folder that the shards happen to lie in.
            indices: Of its rows that may be chosen, ascending: ``[n]``.
        """
        hashes = row_hashes(self._seed, name, indices)
        if len(self._hashes) >= self._size:  # most rows of a long run end here
            low = hashes <= self._hashes[: self._size].max(initial=0)
            hashes, indices = hashes[low], indices[low]
        self._hashes = np.concatenate([self._hashes, hashes])
        self._shards = np.concatenate([self._shards, np.full(len(hashes), self._num_shards, dtype=np.int32)])
        self._indices = np.concatenate([self._indices, indices.astype(np.int32)])
        self._num_shards += 1
        if len(self._hashes) >= 2 * self._size:
            self._trim()

    def finish(self) -> RowSample:
        """The sample of all that was added."""
        self._trim()
        return RowSample(shards=self._shards, indices=self._indices)

    def _trim(self) -> None:
        # Stable: of equal hashes, those of the first shards and indices stay.
        order = np.argsort(self._hashes, kind="stable")[: self._size]
        self._hashes, self._shards, self._indices = self._hashes[order], self._shards[order], self._indices[order]


def row_hashes(seed: int, name: str, indices: np.ndarray) -> np.ndarray:
    """A hash of each row, uint64 ``[n]``: SplitMix64 (Steele et al., 2014), started at the BLAKE2b of seed and name."""
    start = blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=8).digest()
    state = np.array(int.from_bytes(start, "little"), dtype=np.uint64)
    mixed = state + (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps around
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return hashes
