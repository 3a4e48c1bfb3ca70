"""Gives tensors memory that was another's before, which costs a fraction of new memory from the system."""

import sys
from collections.abc import Sequence
from math import prod

import numpy as np
import torch

#: Pieces of memory of one size that are kept: for batches made ahead, and the one trained on.
_MOST_KEPT = 6

#: Smaller tensors are as quick to be had anew.
_SMALLEST_BYTES = 1 << 16


class Recycler:
    """Gives tensors, and takes their memory again when the last tensor that shares it is gone.

    A page of new memory is cleared by the system when it is first written, and taken away again with the tensor. For
    views of a few hundred images that is several times the work of writing them.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[np.ndarray]] = {}

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape and type; what it holds is left to chance."""
        num_bytes = prod(shape) * dtype.itemsize
        if num_bytes < _SMALLEST_BYTES:
            return torch.empty(*shape, dtype=dtype)
        return torch.from_numpy(self._memory(num_bytes)).view(dtype).view(*shape)

    def _memory(self, num_bytes: int) -> np.ndarray:
        kept = self._kept.setdefault(num_bytes, [])
        for place in range(len(kept)):
            if _num_references(kept, place) == _OF_THE_LIST_ONLY:  # a tensor of it, or of a part of it, is one more
                return kept[place]
        memory = np.empty(num_bytes, dtype=np.uint8)
        if len(kept) < _MOST_KEPT:
            kept.append(memory)
        return memory


def _num_references(kept: list[np.ndarray], place: int) -> int:
    """Counted in one function, since how many are passing ones depends on the code and on Python's version."""
    return sys.getrefcount(kept[place])


_OF_THE_LIST_ONLY = _num_references([np.empty(1, dtype=np.uint8)], 0)
