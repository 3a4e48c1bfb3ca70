"""In which precision a model multiplies its matrices, and with what."""

import copy
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from clipfilter_wds.shortcuts import take_shortcuts
from clipfilter_wds.towers import Towers

Precision = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

#: A model whose widest tower is narrower than this gains little from low precision (measured: 1.5 times at 128,
#: 2.5 at 256), and that little is lost in rechecking.
NARROW = 256


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device that ``device`` names; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: When it names a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; use auto, cpu, cuda or cuda:1") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return resolved


def resolve_precision(precision: Precision, device: torch.device, width: int) -> Precision:
    """What ``auto`` means for a device and a model whose wider tower has this width."""
    if precision not in ("auto", "fp32", *DTYPES):
        raise ValueError(f"precision is {precision!r}; use auto, fp32, bf16 or fp16")
    if precision != "auto":
        return precision
    if width < NARROW:
        return "fp32"
    if device.type == "cuda":
        return "fp16"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def low_precision(model: Towers, precision: Precision) -> Towers:
    """A copy whose matrices are in low precision; norms, embeddings and what flows between the layers stay in float32.

    So do the last projections, into the space where both embeddings meet. Against a model that is low precision
    throughout, that more than halves the error of the scores at the same speed.
    """
    fast = copy.deepcopy(model)
    take_shortcuts(fast)
    for name, module in list(fast.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith("_projection"):
            fast.set_submodule(name, _Float32Linear(module))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.to(DTYPES[precision])
    return fast


class _Float32Linear(nn.Module):
    """Stays in float32 under autocast."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return functional.linear(features.float(), self.weight, self.bias)


def onednn_products(device: torch.device, width: int) -> AbstractContextManager[Any]:
    """Where linear layers are oneDNN's own, on this device and with towers of this width.

    torch leaves float32 products on a CPU to MKL, which has no AVX-512 code for processors that are not Intel's. oneDNN
    has: on an AMD EPYC it is 2.1 times as fast. In bf16 torch does call oneDNN, but for the product alone; with the
    bias added there as well the image tower of a ViT-B/32 is 1.03 times as fast; where oneDNN has no bf16, torch
    multiplies it in its own way. In small models the calls would cost more than that gains.
    """
    has_onednn = torch.backends.mkldnn.is_available()
    uses_mkl = device.type == "cpu" and torch.backends.mkl.is_available()
    if uses_mkl and has_onednn and width >= NARROW and hasattr(torch.ops.mkldnn, _PRODUCT):
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return _OneDnnProducts({torch.float32, torch.bfloat16} if has_bf16 else {torch.float32})
    return nullcontext()


#: What torch's own compiler makes of a linear layer on a CPU.
_PRODUCT = "_linear_pointwise"


class _OneDnnProducts(TorchFunctionMode):
    def __init__(self, dtypes: Collection[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and (dtype := _dtype_of_product(args[1])) in self._dtypes:
            return _onednn_linear(dtype, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dtype_of_product(weight: Tensor) -> torch.dtype:
    """What the layer would be computed in without us, whose operator autocast does not know."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def _onednn_linear(dtype: torch.dtype, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(features.to(dtype), weight.to(dtype), bias, "none", [], "")
    return product
