"""Measures which kernels take the GPU's time while batches are scored, and how much of the time it has any."""

import time
from collections import Counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.timing import synchronize
from clipfilter_wds.models.recheck import Recheck

#: Kinds of kernels, by parts of their names; the first that fits.
_KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "cudnn_generated"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "::mm", "bmm", "linear"),
    "norms": ("norm",),
    "copies": ("copy", "memcpy", "cast", "_to_copy"),
}
_NUM_BATCHES, _NUM_TOP = 6, 12


def kernels(bench: Bench, size: str) -> dict[str, Any]:
    """Microseconds per sample by kind, and of the dearest kernels; on a CPU, of torch's operations."""
    batch = bench.run_options(size).batch_size
    batches = [bench.inputs(size, batch)] * _NUM_BATCHES
    recheck = Recheck(bench.scorer(size), bench.threshold(size))

    def score() -> None:
        for _ in recheck.map(batches, lambda each: each, lambda each, may_be_kept: None):
            pass
        synchronize(bench.device)

    score()
    is_on_gpu = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_on_gpu else ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        score()
        seconds = time.perf_counter() - started
    names, launches = Counter(), Counter()
    for event in found.events():
        if is_on_gpu and str(event.device_type).endswith("CUDA"):
            micros = event.time_range.elapsed_us()
        elif not is_on_gpu and event.name.startswith("aten::"):
            micros = event.self_cpu_time_total
        else:
            continue
        names[event.name] += micros
        launches[event.name] += 1
    kinds, count = Counter(), batch * _NUM_BATCHES
    for name, micros in names.items():
        kinds[_kind(name)] += micros
    return {
        "batch": batch,
        "kernels_per_batch": round(launches.total() / _NUM_BATCHES),
        "busy_share": round(names.total() / 1e6 / seconds, 3),
        **{f"{kind}, us per sample": round(micros / count, 2) for kind, micros in kinds.most_common()},
        "rows": [
            {"kernel": name[:80], "us per sample": round(micros / count, 3)}
            for name, micros in names.most_common(_NUM_TOP)
        ],
    }


def _kind(name: str) -> str:
    return next((kind for kind, words in _KINDS.items() if any(word in name.lower() for word in words)), "others")
