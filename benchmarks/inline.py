"""What filtering costs a training run: step time with and without it, for models from cheap to dear."""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from statistics import median
from typing import Any

import torch
import webdataset as wds
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.material import Data
from benchmarks.options import Options
from benchmarks.report import Report
from benchmarks.rounds import Spread
from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
from clipfilter_wds.models.precision import resolve_precision

#: Cost of a training step in forward passes of the CLIP that filters.
_COSTS = (1, 4, 16)
#: Steps that are timed, after those in which the workers and the scorer get ahead.
_STEPS, _FIRST_STEPS = 4, 2

#: Repeats of a training step's layers by which their time is measured.
_FEW = 8

_train_view = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(224, antialias=True)])


def inline(options: Options, report: Report) -> None:
    """Overhead of filtering with everything kept; where a share is kept, divide by it."""
    device = options.torch_device
    scorer = ClipScorer(options.model, device=device)
    data = options.data()
    needed = options.batch_size * (_STEPS + _FIRST_STEPS + 1)
    if len(data.rows) < needed:
        raise SystemExit(f"num_samples is {options.num_samples}; {needed} are needed at this batch size")
    forward = seconds_per_batch(scorer, options)
    rows, times = [], {}
    for cost in _COSTS:
        train_step = TrainStep(cost * forward, options.batch_size, device)
        plain, filtered = [], []
        for number in range(options.turns()):
            plain.append(step_time(_plain_loader(data, options), train_step))
            filtered.append(step_time(_filtering_loader(data, options, scorer), train_step))
            report.tell(f"round {number + 1}/{options.turns()}  {cost}x: {plain[-1]:.3f} s, with {filtered[-1]:.3f} s")
        overhead = Spread.of([100 * (after / before - 1) for before, after in zip(plain, filtered, strict=True)])
        rows.append({"cost": f"{cost}x", "plain": median(plain), "filtered": median(filtered), "overhead": overhead})
        times[cost] = {"plain": plain, "filtered": filtered}
    report.table(
        f"training step, {options.size}, batches of {options.batch_size}, forward pass {forward:.3f} s, {device}",
        {"step / CLIP forward": "cost", "s": "plain", "s, filtered": "filtered", "overhead in %": "overhead"},
        [{**row, "plain": f"{row['plain']:.3f}", "filtered": f"{row['filtered']:.3f}"} for row in rows],
    )
    report.add("inline", rows=rows, seconds_per_step=times, clip_forward=forward)


class TrainStep:
    """Forward, backward and update of transformer-like layers, as many as take a given time.

    In bf16, but in float32 on a processor that is slower in bf16.
    """

    def __init__(self, seconds: float, batch_size: int, device: torch.device) -> None:
        width, tokens = 768, 50
        dtype = torch.float32 if resolve_precision("auto", device, width) == "fp32" else torch.bfloat16
        self._layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self._layers.to(device, dtype)
        self._optimizer = torch.optim.SGD(self._layers.parameters(), lr=1e-6)
        self._activations = torch.randn(batch_size * tokens, width, device=device, dtype=dtype)
        self._device, self._repeats = device, 1
        self(None)
        self._repeats = repeats_for(seconds, self._seconds_of)

    def _seconds_of(self, repeats: int) -> float:
        self._repeats = repeats
        return median(_timed(lambda: self(None)) for _ in range(5))

    def __call__(self, images: Tensor | None) -> None:
        for _ in range(self._repeats):
            self._layers(self._activations).square().mean().backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        if images is not None:
            images.to(self._device).float().mean()
        if self._device.type == "cuda":  # not for the scorer, which has a stream of its own
            torch.cuda.current_stream(self._device).synchronize()


def repeats_for(seconds: float, seconds_of: Callable[[int], float]) -> int:
    """How many repeats take so long. One alone takes a GPU longer than each of several, so a few are measured."""
    few = min(_FEW, max(1, round(seconds / seconds_of(1))))
    return max(1, round(seconds / seconds_of(few) * few))


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def seconds_per_batch(scorer: ClipScorer, options: Options) -> float:
    pairs = [scorer.preprocess.open_pair(path.read_bytes(), text) for path, text in options.data().rows]
    pixels, tokens = scorer.preprocess.collate(pairs[: options.batch_size])
    return median(_timed(lambda: scorer(pixels, tokens.input_ids).cpu()) for _ in range(5))


def step_time(
    batches: Iterable[Tensor],
    train_step: Callable[[Tensor], None],
    steps: int = _STEPS,
    first_steps: int = _FIRST_STEPS,
) -> float:
    """Seconds per step, waiting for the batch included."""
    stream: Iterator[Tensor] = iter(batches)
    for images in islice(stream, first_steps):
        train_step(images)
    started, taken = time.perf_counter(), 0
    for images in islice(stream, steps):
        train_step(images)
        taken += 1
    if taken < steps:
        raise ValueError(f"there were batches for {taken} steps only, and {steps} are to be timed")
    return (time.perf_counter() - started) / steps


def _plain_loader(data: Data, options: Options) -> Iterator[Tensor]:
    """What people train with when they don't filter."""
    dataset = (
        wds.WebDataset([str(shard) for shard in data.shards], shardshuffle=False, workersplitter=None)
        .compose(wds.split_by_worker)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(_train_view, str)
        .batched(options.batch_size)
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=options.workers)
    return (images for images, _ in loader)


def _filtering_loader(data: Data, options: Options, scorer: ClipScorer) -> Iterator[Tensor]:
    loader = ClipFilterLoader(
        ClipWebDataset([*data.shards], scorer.preprocess, image_transform=_train_view),
        scorer,
        threshold=-1.0,
        batch_size=options.batch_size,
        score_batch_size=options.batch_size,
        num_workers=options.workers,
    )
    return (batch["image"] for batch in loader)
