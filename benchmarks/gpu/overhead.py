"""Measures what filtering costs a training run on the same GPU, with everything kept and with a part."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from benchmarks.gpu.bench import KEPT, Bench
from benchmarks.gpu.timing import seconds_of
from benchmarks.inline import TrainStep, step_time
from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset

#: Seconds that the steps of a measurement take together, about, and steps in which workers and scorer get ahead.
_SECONDS, _FIRST_STEPS = 3.0, 6


def overhead(bench: Bench, size: str, cost: int) -> dict[str, Any]:
    """A step that costs ``cost`` forward passes of the CLIP, with the same loader in each case."""
    scorer, batch = bench.scorer(size), bench.scale.train_batch
    pixels, ids = bench.inputs(size, batch)
    there = pixels.to(bench.device)
    forward = seconds_of(lambda: scorer(there, ids), bench.device, least=bench.scale.seconds)
    train_step = TrainStep(cost * forward, batch, bench.device)
    fewest, most = bench.scale.steps
    steps = max(fewest, min(most, int(_SECONDS / (cost * forward))))
    first_steps = min(_FIRST_STEPS, fewest)

    def milliseconds(scorer: ClipScorer | None, threshold: float | None) -> float:
        return 1e3 * step_time(_images(bench, size, scorer, threshold), train_step, steps, first_steps)

    plain = milliseconds(None, None)
    decoded = bench.record.figure("decoding", "256 px, all")
    found: dict[str, Any] = {
        "plain_ms": round(plain, 2),
        "clip_forward_ms": round(1e3 * forward, 2),
        "forward_passes_per_step": round(plain / (1e3 * forward), 1),
        "decoding_ms": None if decoded is None else round(1e3 * batch / decoded, 2),
        "steps": steps,
    }
    for kept, threshold in (("all", -1.0), (f"{KEPT:.0%}", bench.threshold(size))):
        filtered = milliseconds(scorer, threshold)
        found[f"{kept} kept, ms"] = round(filtered, 2)
        found[f"{kept} kept, overhead_%"] = round(100 * (filtered / plain - 1), 1)
    return found


def _images(bench: Bench, size: str, scorer: ClipScorer | None, threshold: float | None) -> Iterator[Tensor]:
    dataset = ClipWebDataset([*bench.shards(256).shards], bench.scorer(size).preprocess)
    batch = bench.scale.train_batch
    loader = ClipFilterLoader(
        dataset,
        scorer,
        threshold=threshold,
        batch_size=batch,
        score_batch_size=batch,
        num_workers=bench.options.workers,
        end="repeat",
        batches_per_epoch=10_000,
    )
    return (each["image"] for each in loader)
