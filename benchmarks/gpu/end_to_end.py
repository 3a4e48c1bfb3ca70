"""Measures runs from shards to decisions: this package's, and the loop that people write."""

import time
from typing import Any

from transformers import CLIPProcessor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.forward import plain_model
from benchmarks.gpu.scale import B32
from benchmarks.gpu.timing import Timeline
from benchmarks.gpu.watch import Watch
from benchmarks.material import Data
from benchmarks.ours import InlineLoader, Rewrite
from benchmarks.peers import WebDatasetLoop

#: Share of the shards that a larger model takes.
_FEWER = 1 / 4

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
    rate = timeline.rate_of_rounds(options.batch_size * max(1, options.workers))
    return {
        "samples_per_s": round(rate),
        "start_and_end_included": round(outcome.num_samples / (time.perf_counter() - started)),
        "of_decoding": _share(rate, bench.record.figure("decoding", f"{image_size} px, all")),
        "of_forward": _share(rate, bench.record.figure(f"forward {size}", "samples_per_s")),
        "times_plain_loop": _share(rate, bench.record.figure(f"plain loop {size}, 256 px", "samples_per_s")),
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
        rate, seen = _rate_of_loop(loop, bench.shards(image_size), options.workers, bench.scale.loop_seconds)
        rows.append({"batch": batch, "samples/s": round(rate), "samples": seen})
    best = max(rows, key=lambda row: row["samples/s"])
    return {
        "samples_per_s": best["samples/s"],
        "best_batch": best["batch"],
        "workers": bench.options.workers,
        "rows": rows,
    }


def _rate_of_loop(loop: WebDatasetLoop, data: Data, num_workers: int, seconds: float) -> tuple[float, int]:
    """Samples per second after each worker's first batch, for so long, or for one more of each; and how many came."""
    timeline, num_batches, seen, until = Timeline(), 0, 0, 0.0
    turn = max(1, num_workers)
    for keys, _ in loop.scores(data):
        num_batches, seen = num_batches + 1, seen + len(keys)
        timeline.note(seen)
        if num_batches == turn:  # up to here workers start, and memory is page-locked for the first time
            until = time.perf_counter() + seconds
        if num_batches >= 2 * turn and time.perf_counter() > until:
            break
    return timeline.rate_of_turns(turn), seen
