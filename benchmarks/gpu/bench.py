"""Makes what the parts share: models, shards, scorers and thresholds. Each is made once, when it is first asked for."""

import math
import multiprocessing
import os
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.record import Record
from benchmarks.gpu.scale import Scale
from benchmarks.material import Data, Size, make_data, make_model
from benchmarks.options import Options
from clipfilter_wds import ClipScorer
from clipfilter_wds.models.batch_size import default_batch_size

#: Share of the pairs that is kept, as by DataComp's baseline of CLIP scores.
KEPT = 0.3


class Bench:
    """What the parts share. A context, in which the shards are there.

    Args:
        options: Of the command.
        scale: How much is measured.
        record: Figures of the parts that are done.
    """

    def __init__(self, options: Options, scale: Scale, record: Record) -> None:
        self.options, self.scale, self.record = options, scale, record
        self.device = options.torch_device
        self._scorers: dict[tuple[Any, ...], ClipScorer] = {}
        self._thresholds: dict[str, float] = {}
        # Forked before anything is computed here. A ViT-L/14 takes a while, in which smaller models are measured.
        self._making = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))
        self._models: dict[Size, Future[Path]] = {
            size: self._making.submit(make_model, options.cache, size) for size in dict.fromkeys(scale.models.values())
        }
        options.cache.mkdir(parents=True, exist_ok=True)
        self._links = tempfile.TemporaryDirectory(dir=options.cache)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._making.shutdown(cancel_futures=True)
        self._links.cleanup()

    def model(self, size: str) -> Path:
        """The folder of a model."""
        return self._models[self.scale.models[size]].result()

    def data(self, image_size: int) -> Data:
        """The samples that differ."""
        drawn = self.scale.drawn[image_size]
        return make_data(self.options.cache, num_samples=self.scale.num_distinct, image_size=drawn)

    def shards(self, image_size: int, share: float = 1.0) -> Data:
        """Shards for a run from end to end: those of the samples that differ, again and again under other names.

        As many for each worker, since to the end all of them have to have something to do.
        """
        distinct, workers = self.data(image_size).shards, max(1, self.options.workers)
        per_worker = math.ceil(share * self.scale.num_shards[image_size] / workers)
        folder = Path(self._links.name, str(image_size))
        folder.mkdir(exist_ok=True)
        links = []
        for number in range(per_worker * workers):
            links.append(folder / f"{number:05d}.tar")
            if not links[-1].exists():
                os.link(distinct[number % len(distinct)], links[-1])
        return Data(links, [])

    def scorer(self, size: str, **options: Any) -> ClipScorer:
        """A model on the device."""
        key = (size, *sorted(options.items()))
        if key not in self._scorers:
            options = {"precision": self.scale.precision, **options}
            self._scorers[key] = ClipScorer(self.model(size), device=self.device, **options)
        return self._scorers[key]

    def run_options(self, size: str, batch_size: int | None = None) -> Options:
        """How a model is run from end to end; None as batch size is the default of the commands."""
        if batch_size is None:
            width = self.scorer(size).fast.width
            batch_size = min(default_batch_size(self.device, width), self.scale.num_distinct // 4)
        return replace(self.options, batch_size=batch_size)

    def inputs(self, size: str, count: int) -> tuple[Tensor, Tensor]:
        """Views, uint8 ``[count, 3, H, W]``, and token ids, int64 ``[count, L]``, of real samples; page-locked."""
        preprocess, rows = self.scorer(size).preprocess, self.data(256).rows
        images = {image for image, _ in rows}
        views = {image: preprocess.open_pair(image.read_bytes(), "a").pixels for image in images}
        chosen = [rows[number % len(rows)] for number in range(count)]
        pixels = torch.stack([views[image] for image, _ in chosen])
        tokens = preprocess.tokenize([[caption] for _, caption in chosen]).input_ids
        return (pixels.pin_memory(), tokens.pin_memory()) if self.device.type == "cuda" else (pixels, tokens)

    def threshold(self, size: str) -> float:
        """What keeps :data:`KEPT` of the pairs, by the scores of a few."""
        if size not in self._thresholds:
            scores = self.scorer(size)(*self.inputs(size, min(512, self.scale.num_distinct)))
            self._thresholds[size] = float(np.quantile(scores.cpu().numpy(), 1 - KEPT))
        return self._thresholds[size]

    @cached_property
    def matmul_flops(self) -> float | None:
        """FLOP/s of a large matrix product in the precision of the scorers; None where it was not measured."""
        return self.record.figure("matmul", "flops")
