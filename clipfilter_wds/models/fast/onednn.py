"""Runs linear layers through oneDNN on AVX-512 CPUs, in eager mode and compiled."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from clipfilter_wds.models.precision import NARROW

#: The operator that torch's own compiler puts in place of a linear layer on a CPU whose weights are constants.
_LINEAR = "_linear_pointwise"


def onednn_linear(device: torch.device, width: int) -> AbstractContextManager[Any]:
    """A context in which linear layers run through oneDNN, where that is faster for towers of this width.

    In float32, torch leaves matrix products on a CPU to MKL, which has no AVX-512 code for CPUs that are not Intel's.
    oneDNN has: on an AMD EPYC it is 2.1 times as fast. In bf16, torch calls oneDNN for the product alone; with the bias
    added there as well, the image tower of a ViT-B/32 is 1.03 times as fast. Where oneDNN has no bf16, torch's own
    kernel stays. For small models the calls would cost more than that gains. Without AVX-512, MKL is as fast or faster,
    and with the oneDNN of older torch releases the bits of a row depend on its place in the batch.

    What is compiled in this context calls oneDNN too, and torch's own SiLU, which on a CPU is 1.6 times as fast as the
    one that torch's compiler writes: a compiled image tower is then 1.11 times as fast as an eager one.
    """
    has_avx512 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if has_avx512 and width >= NARROW and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, _LINEAR):
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return _OneDnnLinear({torch.float32, torch.bfloat16} if has_bf16 else {torch.float32})
    return nullcontext()


class _OneDnnLinear(TorchFunctionMode):
    def __init__(self, dtypes: Collection[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and (dtype := _linear_dtype(args[1])) in self._dtypes:
            return _linear(dtype, *args, **(kwargs or {}))
        if func is functional.silu and torch.compiler.is_compiling():
            return torch.ops.clipfilter_wds.silu(args[0])
        return func(*args, **(kwargs or {}))


def _linear_dtype(weight: Tensor) -> torch.dtype:
    """The type that the layer would be computed in; autocast does not know oneDNN's operator."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _linear(dtype: torch.dtype, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    linear = torch.ops.clipfilter_wds.linear if torch.compiler.is_compiling() else _onednn_linear
    output: Tensor = linear(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return output


def _onednn_linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(features, weight, bias, "none", [], "")
    return output


# --- operators that the compiler does not look into ---


def _output_like(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return features.new_empty(*features.shape[:-1], weight.shape[0])


torch.library.define("clipfilter_wds::linear", "(Tensor features, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("clipfilter_wds::linear", "CPU", _onednn_linear)
torch.library.register_fake("clipfilter_wds::linear", _output_like)

torch.library.define("clipfilter_wds::silu", "(Tensor features) -> Tensor")
torch.library.impl("clipfilter_wds::silu", "CPU", functional.silu)
torch.library.register_fake("clipfilter_wds::silu", torch.empty_like)
