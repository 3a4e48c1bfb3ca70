"""Gives tensors memory that was another's before, which costs a fraction of new memory from the system."""

import sys
from collections.abc import Sequence
from math import prod

import numpy as np
import torch

#: Pieces of memory that are kept: some columns of batches made ahead, and of the one trained on.
_MOST_KEPT = 24

#: Smaller tensors are as quick to be had anew.
_SMALLEST_BYTES = 1 << 16


class Recycler:
    """Gives tensors, and takes their memory again when the last tensor that shares it is gone.

    A page of new memory is cleared by the system when it is first written, and taken away again with the tensor. For
    views of a few hundred images that is several times the work of writing them.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []  # in order of their last use

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape and type; what it holds is left to chance."""
        num_bytes = prod(shape) * dtype.itemsize
        if num_bytes < _SMALLEST_BYTES:
            return torch.empty(*shape, dtype=dtype)
        return torch.from_numpy(self._memory(_rounded(num_bytes))[:num_bytes]).view(dtype).view(*shape)

    def _memory(self, num_bytes: int) -> np.ndarray:
        kept = self._kept
        for place in range(len(kept)):
            # A tensor of it, or of a part of it, is one reference more.
            if kept[place].nbytes == num_bytes and _num_references(kept, place) == _OF_THE_LIST_ONLY:
                kept.append(kept.pop(place))
                return kept[-1]
        kept.append(np.empty(num_bytes, dtype=np.uint8))
        del kept[:-_MOST_KEPT]
        return kept[-1]


def _rounded(num_bytes: int) -> int:
    """A quarter more at most, so that batches of which nearly as much is kept take each other's memory."""
    step = 1 << max(0, num_bytes.bit_length() - 3)
    return -(-num_bytes // step) * step


def _num_references(kept: list[np.ndarray], place: int) -> int:
    """Counted in one function, since how many are passing ones depends on the code and on Python's version."""
    return sys.getrefcount(kept[place])


_OF_THE_LIST_ONLY = _num_references([np.empty(1, dtype=np.uint8)], 0)
