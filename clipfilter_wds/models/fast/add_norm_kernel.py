"""The kernel of :func:`clipfilter_wds.models.fast.add_norm.add_norm`, in Triton, which comes with torch for GPUs."""

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def add_norm_kernel(
    states: "Any",
    added: "Any",
    weight: "Any",
    bias: "Any",
    normed: "Any",
    eps: "Any",
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A program for each row of ``width`` numbers; ``block`` is the power of two that is not below it."""
    columns = tl.arange(0, block)
    is_there = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    row = tl.load(states + places, is_there, 0.0) + tl.load(added + places, is_there, 0.0).to(tl.float32)
    tl.store(states + places, row, is_there)
    mean = tl.sum(row, 0) / width
    centred = tl.where(is_there, row - mean, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / width + eps)
    row = centred * scale * tl.load(weight + columns, is_there, 0.0) + tl.load(bias + columns, is_there, 0.0)
    tl.store(normed + places, row.to(normed.dtype.element_ty), is_there)
