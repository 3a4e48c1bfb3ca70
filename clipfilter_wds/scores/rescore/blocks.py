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


def exact_products(rows: Tensor, others: Tensor) -> Tensor:
    """The product of each row with the other of its place, both ``[n, D]``, in float64: ``[n]``."""
    return (rows.double() * others.double()).sum(1)
