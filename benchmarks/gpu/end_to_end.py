"""Measures runs from shards to decisions: this package's, and the loop that people write."""

import time
from typing import Any

from transformers import CLIPProcessor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.forward import plain_model
from benchmarks.gpu.scale import B32
from benchmarks.gpu.timing import Timeline
from benchmarks.gpu.watch import Watch
from benchmarks.ours import InlineLoader, Rewrite
from benchmarks.peers import WebDatasetLoop

#: Share of the shards that a larger model takes.
_FEWER = 1 / 3

#: Batches of the plain loop: the best of them counts.
_LOOP_BATCHES = (64, 256, 1024)


def rewrite(bench: Bench, size: str, image_size: int) -> dict[str, Any]:
    """``clipfilter-wds rewrite``, the writing included."""
    return _run(bench, Rewrite, size, image_size)


def inline(bench: Bench, size: str, image_size: int) -> dict[str, Any]:
    """The loader, whose batches nobody trains on."""
    return _run(bench, InlineLoader, size, image_size)


def _run(bench: Bench, use: type[Rewrite] | type[InlineLoader], size: str, image_size: int) -> dict[str, Any]:
    options, timeline = bench.run_options(size), Timeline()
    data = bench.shards(image_size, 1.0 if size == B32 else _FEWER)
    contender = use(options, bench.scorer(size), bench.threshold(size), timeline.note)
    started = time.perf_counter()
    with Watch(bench.device) as watch:
        outcome = contender(data)
    return {
        "samples_per_s": round(timeline.rate),
        "start_and_end_included": round(outcome.num_samples / (time.perf_counter() - started)),
        "of_decoding": _share(timeline.rate, bench.record.figure("decoding", f"{image_size} px, all")),
        "of_forward": _share(timeline.rate, bench.record.figure(f"forward {size}", "samples_per_s")),
        "times_plain_loop": _share(timeline.rate, bench.record.figure(f"plain loop {size}, 256 px", "samples_per_s")),
        "samples": outcome.num_samples,
        "batch": options.batch_size,
        "workers": options.workers,
        "rechecked": outcome.num_rechecked,
        **watch.figures,
    }


def _share(rate: float, of: float | None) -> float | None:
    return None if of is None else round(rate / of, 3)


def plain_loop(bench: Bench, size: str, image_size: int) -> dict[str, Any]:
    """webdataset, ``CLIPProcessor`` in workers, page-locked batches, ``CLIPModel`` in low precision with SDPA."""
    model, processor = plain_model(bench, size), CLIPProcessor.from_pretrained(bench.model(size))
    rows = []
    for batch in _LOOP_BATCHES if not bench.options.quick else bench.scale.batches[size]:
        options = bench.run_options(size, batch)
        loop = WebDatasetLoop(model, processor, options, threshold=0.0, trimmed=True)
        timeline, seen, until = Timeline(), 0, None
        for keys, _ in loop.scores(bench.shards(image_size)):
            seen += len(keys)
            timeline.note(seen)
            until = until or time.perf_counter() + bench.scale.loop_seconds  # from the first batch on
            if time.perf_counter() > until:
                break
        rows.append({"batch": batch, "samples/s": round(timeline.rate), "samples": seen})
    best = max(rows, key=lambda row: row["samples/s"])
    rewritten = bench.record.figure(f"rewrite {size}, {image_size} px", "samples_per_s")
    return {
        "samples_per_s": best["samples/s"],
        "best_batch": best["batch"],
        "workers": bench.options.workers,
        "rewrite_is_times": _share(rewritten, best["samples/s"]) if rewritten else None,
        "rows": rows,
    }
