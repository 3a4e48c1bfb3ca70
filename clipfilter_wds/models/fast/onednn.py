"""Who multiplies matrices on a processor: oneDNN, in what torch runs as it is and in what it compiles."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from clipfilter_wds.models.precision import NARROW

#: What torch's own compiler makes of a linear layer on a CPU, when it may take the weights for constants.
_PRODUCT = "_linear_pointwise"


def onednn_products(device: torch.device, width: int) -> AbstractContextManager[Any]:
    """Where linear layers are oneDNN's own, on this device and with towers of this width.

    torch leaves float32 products on a CPU to MKL, which has no AVX-512 code for processors that are not Intel's. oneDNN
    has: on an AMD EPYC it is 2.1 times as fast. In bf16 torch does call oneDNN, but for the product alone; with the
    bias added there as well the image tower of a ViT-B/32 is 1.03 times as fast; where oneDNN has no bf16, torch
    multiplies it in its own way. In small models the calls would cost more than that gains. Without AVX-512 MKL is as
    fast or faster, and the oneDNN of older torches gives a row other bits by where in the batch it is.

    What is compiled within it has these products too, and torch's own SiLU, which on a processor is 1.6 times as fast
    as the one that its compiler writes: a compiled image tower is then 1.11 times as fast as one that is not.
    """
    has_avx512 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if has_avx512 and width >= NARROW and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, _PRODUCT):
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return _OneDnnProducts({torch.float32, torch.bfloat16} if has_bf16 else {torch.float32})
    return nullcontext()


class _OneDnnProducts(TorchFunctionMode):
    def __init__(self, dtypes: Collection[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and (dtype := _dtype_of_product(args[1])) in self._dtypes:
            return _linear(dtype, *args, **(kwargs or {}))
        if func is functional.silu and torch.compiler.is_compiling():
            return torch.ops.clipfilter_wds.silu(args[0])
        return func(*args, **(kwargs or {}))


def _dtype_of_product(weight: Tensor) -> torch.dtype:
    """What the layer would be computed in without us, whose operator autocast does not know."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _linear(dtype: torch.dtype, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    multiply = torch.ops.clipfilter_wds.linear if torch.compiler.is_compiling() else _multiply
    product: Tensor = multiply(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return product


def _multiply(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(features, weight, bias, "none", [], "")
    return product


# --- for the compiler, operators that it does not look into ---


def _product_like(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return features.new_empty(*features.shape[:-1], weight.shape[0])


torch.library.define("clipfilter_wds::linear", "(Tensor features, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("clipfilter_wds::linear", "CPU", _multiply)
torch.library.register_fake("clipfilter_wds::linear", _product_like)

torch.library.define("clipfilter_wds::silu", "(Tensor features) -> Tensor")
torch.library.impl("clipfilter_wds::silu", "CPU", functional.silu)
torch.library.register_fake("clipfilter_wds::silu", torch.empty_like)
