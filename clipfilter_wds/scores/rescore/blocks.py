"""Cuts matrix products into blocks of a fixed shape, so that results do not depend on what is computed with them."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

#: Rows and columns of a block of products: what stays in the cache of a core, and what keeps a GPU busy.
_CPU_BLOCK, _GPU_BLOCK = (512, 2048), (4096, 16_384)


def block_shape(device: torch.device) -> tuple[int, int]:
    """How many rows and columns a block of products has."""
    return _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK


def row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` rows; the last one may have fewer."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def as_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device, in the dtype that it has; on the CPU it is shared, unless it can't be written to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows, ``[n, D]``, of length 1 but for float32's rounding: saved embeddings are so but for their own type's."""
    return torch.nn.functional.normalize(rows.float(), dim=1)


def exact_cosines(rows: Tensor, others: Tensor) -> Tensor:
    """The cosine of each row and the other of its place, both ``[n, D]``, in float64: ``[n]``; 1 if they are equal."""
    rows, others = rows.double(), others.double()
    # The root of a square is the number itself; the product of two roots need not be.
    return (rows * others).sum(1) / ((rows * rows).sum(1) * (others * others).sum(1)).sqrt()
