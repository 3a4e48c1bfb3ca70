"""Adds to what flows between the layers of a transformer, and normalises the sum, in one pass over a GPU's memory."""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LOG = logging.getLogger(__name__)


def add_norm(states: Tensor, added: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Add in float32, and normalise the sum.

    The steps one by one, with the casts between them, would read and write 24 bytes per number where ``dtype`` has two;
    one kernel does 12. On a CPU, and where a compiler writes the kernels, they are left as they are.

    Args:
        states: float32 ``[..., D]``. On a GPU the sum may take its memory.
        added: ``[..., D]``.
        norm: Over D numbers, with weight and bias, in float32.
        dtype: What normalised numbers are rounded to.

    Returns:
        The sum, float32 ``[..., D]``, and what ``norm`` makes of it, ``[..., D]`` in ``dtype``.
    """
    is_low = dtype != torch.float32 and states.device.type == "cuda"
    if is_low and not torch.compiler.is_compiling() and states.is_contiguous() and added.is_contiguous():
        kernel = _kernel_on(states.device)
        if kernel is not None:
            return states, _launch(kernel, states, added, norm, dtype)
    states = states + added
    return states, layer_norm(states, norm, dtype)


def layer_norm(states: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """Normalise float32 ``[..., D]``, and round to ``dtype``."""
    return functional.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(dtype)


def _launch(kernel: Any, states: Tensor, added: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """Leave the sum in ``states``, and return it normalised."""
    width = states.shape[-1]
    normed = torch.empty_like(states, dtype=dtype)
    with torch.cuda.device_of(states):  # that Triton launches on
        programs = kernel[(states.numel() // width,)]
        programs(states, added, norm.weight, norm.bias, normed, norm.eps, width, 1 << (width - 1).bit_length())
    return normed


@cache
def _kernel_on(device: torch.device) -> Any:
    """The kernel, if Triton, which needs a C compiler, can run it on this device; else None."""
    try:
        from clipfilter_wds.models.fast.add_norm_kernel import add_norm_kernel

        norm = nn.LayerNorm(96, device=device, dtype=torch.float32)  # no power of two
        states = torch.linspace(-2, 3, 4 * 96, device=device, dtype=torch.float32).view(4, 96)
        expected = layer_norm(states + states, norm, torch.float16)
        torch.testing.assert_close(_launch(add_norm_kernel, states, states.clone(), norm, torch.float16), expected)
    except Exception as error:  # noqa: BLE001  # of Triton, of a compiler or of the GPU
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _LOG.warning("Triton can't be used, so a GPU takes longer for each layer: %s", reason)
        return None
    return add_norm_kernel
