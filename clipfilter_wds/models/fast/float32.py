"""Keeps products of float32 matrices from being computed in TF32 or bfloat16, which torch can be told to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: What torch calls float32 itself; none: nothing was chosen.
_EXACT = ("ieee", "none")


class ReducedFloat32Error(RuntimeError):
    """torch was told to compute float32 products with less precision."""


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Have torch multiply float32 matrices on a device in float32, in all threads, while in this context."""
    if _multiplies_in_float32(device):
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # chosen in the way of newer torch, which can't be mixed with the other
        matmul: Any = getattr(torch.backends, _backend(device)).matmul
        precision = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = precision
        return
    on_cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)  # since 2.9
    precision_on_cpu = getattr(on_cpu, "fp32_precision", None)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        if precision_on_cpu is not None:  # which that has set, too
            on_cpu.fp32_precision = precision_on_cpu


def check_float32_products(device: torch.device) -> None:
    """Make sure that float32 matrices are multiplied in float32 on a device.

    The setting is the whole process's, so that to change it here would change what other threads compute.

    Raises:
        ReducedFloat32Error: When they are not.
    """
    if _multiplies_in_float32(device):
        return
    name, setting = _backend(device), _setting_of(device)
    raise ReducedFloat32Error(
        f"torch was told to multiply float32 matrices on {device} with less precision "
        f"(torch.backends.{name}.matmul: {setting}), so scores would not be float32's, nor decisions near the "
        "threshold; call torch.set_float32_matmul_precision('highest'), or in newer code set "
        f"torch.backends.{name}.matmul.fp32_precision = 'ieee'. On a GPU the setting can stay if the scorer is "
        "made in the main thread, with cuda_graphs: float32 is then computed as it was captured at first"
    )


def exact_parts(numbers: Tensor) -> tuple[Tensor, ...]:
    """Matrices that sum up to ``numbers``, whose products with whole numbers of up to 8 bits torch computes exactly.

    Args:
        numbers: float32, whole numbers of up to 17 bits and a sign. In a product, sums of absolute values must be below
            2^24.

    Returns:
        ``numbers`` itself where torch multiplies in float32. Where it was told to do so in TF32 or bfloat16, which hold
        8 bits, two matrices of so many each.
    """
    if _multiplies_in_float32(numbers.device):
        return (numbers,)
    upper = (numbers / 512).round() * 512
    return upper, numbers - upper


def _multiplies_in_float32(device: torch.device) -> bool:
    setting = _setting_of(device)
    # Few CPUs have instructions for less.
    return _is_exact(setting) or (device.type == "cpu" and _is_exact_on_cpu(setting))


def _setting_of(device: torch.device) -> str:
    return _setting(getattr(getattr(torch.backends, _backend(device)), "matmul", None))


def _backend(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "mkldnn"


def _setting(matmul: Any) -> str:
    """ieee, none, tf32 or bf16."""
    setting = getattr(matmul, "fp32_precision", None) if matmul is not None else None
    if setting is None:  # before torch 2.9
        return {"highest": "ieee", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]
    return str(setting)


def _is_exact(setting: str) -> bool:
    return setting in _EXACT


@cache
def _is_exact_on_cpu(setting: str) -> bool:
    """Multiply, under this setting, numbers with more digits than TF32 or bfloat16 have. Are they still there?

    Large matrices, since torch multiplies small ones in float32 all the same; and in two ways, each with a limit of its
    own.
    """
    identity = torch.eye(512, dtype=torch.float32, device="cpu")
    numbers = torch.full_like(identity, 1 + 2.0**-20)
    products = (functional.linear(numbers, identity), torch.bmm(numbers[None], identity[None])[0])
    return all(torch.equal(product, numbers) for product in products)


# --- convolutions ---


def keep_convolutions(towers: nn.Module) -> None:
    """Have the convolutions of a model computed in float32, which torch's default on a GPU is not."""
    for name, module in list(towers.named_modules()):
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            towers.set_submodule(name, _Float32Conv2d(module))


class _Float32Conv2d(nn.Module):
    """A convolution that does not ask the setting for all of the process."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self._options: dict[str, Any] = {
            "stride": convolution.stride,
            "padding": convolution.padding,
            "dilation": convolution.dilation,
            "groups": convolution.groups,
        }

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = torch._convolution(
            pixels, self.weight, self.bias, **self._options, transposed=False, output_padding=(0, 0),
            benchmark=False, deterministic=False, cudnn_enabled=True, allow_tf32=False,
        )  # fmt: skip
        return features
