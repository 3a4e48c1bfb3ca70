"""Compares decisions and scores with those of float32, on the device and on a CPU, and times the rechecking."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel

from benchmarks.gpu.bench import KEPT, Bench
from benchmarks.gpu.timing import synchronize
from clipfilter_wds.models.recheck import BatchScores, Recheck

Batches = Sequence[tuple[Tensor, Tensor]]

#: Shares that are kept; each threshold is the score of a sample.
_SHARES = (0.1, KEPT, 0.5, 0.7, 0.9)


def decisions(bench: Bench, size: str) -> dict[str, Any]:
    """How many decisions are other than float32's, and how far off scores are; the band, and what rechecking takes."""
    scorer, count = bench.scorer(size), bench.scale.num_decided[size]
    batch = bench.run_options(size).batch_size
    batches = list(zip(*(part.split(batch) for part in bench.inputs(size, count)), strict=True))
    exact, exact_seconds = _timed(bench, lambda: [scorer(*each, exact=True).cpu() for each in batches])
    fast, fast_seconds = _timed(bench, lambda: [scorer(*each).cpu() for each in batches])
    exact, fast = (torch.cat(scores).numpy() for scores in (exact, fast))
    others = others_without = 0
    for share in _SHARES:
        threshold = float(np.sort(exact)[int((1 - share) * (count - 1))])
        scores = np.concatenate([each.scores for each in _rechecked(Recheck(scorer, threshold), batches)])
        others += int(((scores >= threshold) != (exact >= threshold)).sum())
        others_without += int(((fast >= threshold) != (exact >= threshold)).sum())
    return {
        "other_decisions": others,
        "other_decisions_without_recheck": others_without,
        "of": count * len(_SHARES),
        "off_float32_of_cpu": _off_cpu(bench, size),
        "fast_off_float32_max": float(np.abs(fast - exact).max()),
        "fast_off_float32_sd": float((fast - exact).std()),
        "sd_of_scores": float(exact.std()),
        "float32_samples_per_s": round(count / exact_seconds),
        "fast_samples_per_s": round(count / fast_seconds),
        **_recheck_figures(bench, size, batches),
    }


def _recheck_figures(bench: Bench, size: str, batches: Batches) -> dict[str, Any]:
    """At the usual threshold."""
    count, times, rechecked = sum(len(pixels) for pixels, _ in batches), {}, 0
    for name, threshold in (("without", None), ("with", bench.threshold(size))):
        recheck = Recheck(bench.scorer(size), threshold)
        _rechecked(recheck, batches)  # measures the band
        found, times[name] = _timed(bench, lambda recheck=recheck: _rechecked(recheck, batches))
        rechecked = sum(each.num_rechecked for each in found)
    return {
        "band": recheck.band,
        "rechecked_share": round(rechecked / count, 4),
        "recheck_us_per_sample": round(1e6 * (times["with"] - times["without"]) / count, 2),
        "recheck_share_of_time": round(1 - times["without"] / times["with"], 3),
    }


def _rechecked(recheck: Recheck, batches: Batches) -> list[BatchScores]:
    return [scores for _, scores in recheck.map(batches, lambda each: each, lambda each, may_be_kept: None)]


@torch.inference_mode()
def _off_cpu(bench: Bench, size: str) -> float:
    """The largest difference of float32 scores on the device from those of the plain model on a CPU."""
    scorer, (pixels, ids) = bench.scorer(size), bench.inputs(size, bench.scale.num_on_cpu[size])
    model = CLIPModel.from_pretrained(bench.model(size), dtype=torch.float32).eval()
    mean, std = scorer.exact.pixel_mean.cpu(), scorer.exact.pixel_std.cpu()
    output = model(input_ids=ids, pixel_values=(pixels - mean) / std)
    expected = (output.image_embeds * output.text_embeds).sum(dim=-1)
    return float((scorer(pixels, ids, exact=True).cpu() - expected).abs().max())


def _timed(bench: Bench, work: Any) -> tuple[Any, float]:
    """What it gives, and the seconds that it takes the second time."""
    work()
    synchronize(bench.device)
    started = time.perf_counter()
    found = work()
    synchronize(bench.device)
    return found, time.perf_counter() - started
