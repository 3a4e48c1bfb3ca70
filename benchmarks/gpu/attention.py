"""Measures which way to compute attention is fastest, at the sizes of the towers."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.scale import B32
from benchmarks.gpu.timing import seconds_of
from clipfilter_wds.models.fast.attention import causal_mask, matmul_attention
from clipfilter_wds.models.precision import DTYPES

#: Heads of 64 numbers, tokens, and whether they see only those before them.
_SIZES = {
    "ViT-B/32 image": (12, 50, False),
    "ViT-L/14 image": (16, 257, False),
    "ViT-B/32 caption of 24": (8, 24, True),
    "ViT-L/14 caption of 24": (12, 24, True),
}
_BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


@torch.inference_mode()
def attention(bench: Bench) -> dict[str, Any]:
    """Microseconds per row and layer; None where a kernel can't do it."""
    batch, dtype = max(bench.scale.batches[B32]) // 2, DTYPES[bench.scorer(B32).precision]
    rows = []
    for size, (heads, length, is_causal) in _SIZES.items():
        # As they lie behind the product that makes all three.
        features = torch.randn(batch, length, 3, heads, 64, dtype=dtype, device=bench.device)
        parts = features.permute(2, 0, 3, 1, 4).unbind()
        found: dict[str, Any] = {"size": size}
        for name, work in _ways(parts, is_causal=is_causal).items():
            found[name] = _micros_per_row(bench, work, batch)
        rows.append(found)
    return {"batch": batch, "rows": rows}


def _ways(parts: tuple[Tensor, ...], *, is_causal: bool) -> dict[str, Callable[[], Tensor]]:
    usual = partial(scaled_dot_product_attention, *parts, is_causal=is_causal)

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return usual()

    mask = causal_mask(parts[0]) if is_causal else None
    return {
        "torch's choice": usual,
        **{name: partial(by, getattr(SDPBackend, name)) for name in _BACKENDS},
        "plain products": partial(matmul_attention, *parts, scale=64**-0.5, mask=mask),
    }


def _micros_per_row(bench: Bench, work: Callable[[], Tensor], batch: int) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that say why there is no kernel of this kind for this device, or these shapes
        try:
            return round(1e6 * seconds_of(work, bench.device, least=bench.scale.seconds / 4) / batch, 3)
        except RuntimeError:
            return None
