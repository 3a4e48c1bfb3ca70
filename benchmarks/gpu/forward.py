"""Measures forward passes, of the scorer and of the model as its library runs it, beside a large matrix product."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.scale import B32
from benchmarks.gpu.timing import host_seconds_of, seconds_of
from benchmarks.limits import image_flops, matmul_rate, text_flops
from clipfilter_wds.models.precision import DTYPES

#: A whole forward pass, and its parts for images and for texts.
Works = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]


def matmul(bench: Bench) -> dict[str, Any]:
    """TFLOP/s of a large matrix product, by precision; and ``flops``, in that of the scorers."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    flops = {name: matmul_rate(bench.device, dtype, seconds=2 * bench.scale.seconds) for name, dtype in dtypes.items()}
    tflops = {f"{name} TFLOP/s": round(rate / 1e12, 2) for name, rate in flops.items()}
    return {**tflops, "flops": flops[bench.scorer(B32).precision]}


def forward(bench: Bench, size: str, **options: Any) -> dict[str, Any]:
    """The scorer, with images on the device and captions on the host, as they come."""
    scorer = bench.scorer(size, **options)

    def ready(pixels: Tensor, ids: Tensor) -> Works:
        there = pixels.to(bench.device)
        return (
            lambda: scorer(there, ids),
            lambda: scorer.fast.encode_image(there),
            lambda: scorer.fast.encode_text(ids),
        )

    return _by_batch(bench, size, ready)


@torch.inference_mode()
def plain_forward(bench: Bench, size: str) -> dict[str, Any]:
    """``CLIPModel`` in low precision with SDPA, everything on the device, captions padded to the batch's longest."""
    model = plain_model(bench, size)

    def ready(pixels: Tensor, ids: Tensor) -> Works:
        images, texts = (pixels.to(bench.device) / 128 - 1).to(model.dtype), ids.to(bench.device)

        def both() -> None:
            model.get_image_features(images)
            model.get_text_features(texts)

        return both, lambda: model.get_image_features(images), lambda: model.get_text_features(texts)

    return _by_batch(bench, size, ready)


def plain_model(bench: Bench, size: str) -> CLIPModel:
    """The model as people run it who filter without this package."""
    dtype = DTYPES[bench.scorer(size).precision]
    return CLIPModel.from_pretrained(bench.model(size), dtype=dtype, attn_implementation="sdpa").eval().to(bench.device)


def _by_batch(
    bench: Bench, size: str, ready: Callable[[Tensor, Tensor], tuple[Callable[[], Any], ...]]
) -> dict[str, Any]:
    """A row for each size of batch, and the best of them."""
    flops, least, rows = useful_flops(bench, size), bench.scale.seconds, []
    for batch in bench.scale.batches[size]:
        whole, images, texts = ready(*bench.inputs(size, batch))
        seconds = seconds_of(whole, bench.device, least=least)
        rows.append(
            {
                "batch": batch,
                "samples/s": round(batch / seconds),
                "ms": round(1e3 * seconds, 3),
                "image ms": round(1e3 * seconds_of(images, bench.device, least=least / 2), 3),
                "text ms": round(1e3 * seconds_of(texts, bench.device, least=least / 2), 3),
                "host ms": round(1e3 * host_seconds_of(whole, bench.device), 3),
                "of matmul": _share(flops * batch / seconds, bench.matmul_flops),
            }
        )
    best = max(rows, key=lambda row: row["samples/s"])
    return {
        "samples_per_s": best["samples/s"],
        "best_batch": best["batch"],
        "of_matmul": best["of matmul"],
        "flops": flops * best["samples/s"],
        "useful_gflop_per_sample": round(flops / 1e9, 3),
        "rows": rows,
    }


def _share(flops: float, of: float | None) -> float | None:
    return None if of is None else round(flops / of, 3)


@cache
def useful_flops(bench: Bench, size: str) -> float:
    """Floating-point operations of a pair in the model as its library runs it, the padding of captions left out."""
    scorer = bench.scorer(size)
    model = CLIPModel.from_pretrained(bench.model(size), dtype=DTYPES[scorer.precision]).eval().to(bench.device)
    _, ids = bench.inputs(size, 256)
    lengths = Counter(scorer.preprocess.tokenize.used_lengths(ids).tolist())
    texts = sum(count * text_flops(model, ids[:1, :length].to(bench.device)) for length, count in lengths.items())
    return image_flops(model, scorer.preprocess.view.crop) + texts / lengths.total()
