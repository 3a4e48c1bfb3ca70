"""Runs the package with a stubbed model in a process of its own, and reads what the host's CPUs spend on it."""

import gc
import multiprocessing
import os
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torchvision.transforms import v2
from transformers.utils import logging as transformers_logging

from benchmarks.clocks import Clocks, CpuTimes
from benchmarks.host_stages import Work, stage_times
from benchmarks.stub import THRESHOLD, stub_scorer
from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset, RewriteConfig, ScoreConfig, process_shards
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import SampleRow

Mode = Literal["rewrite", "score", "inline", "from_scores"]
Views = Literal["uint8", "float32"]

#: A training view as people make it: float32.
TRAIN_VIEW = v2.Compose(
    [
        v2.RandomResizedCrop(224, interpolation=v2.InterpolationMode.BICUBIC),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement.

    Attributes:
        mode: Which use of the package.
        image_size: Side of the JPEGs, in pixels.
        batch_size: Samples per forward pass, and per training batch.
        views: What training gets of an image: CLIP's view, or a float32 one of its own; None where nobody trains.
        kept: Share of the samples that is kept; None where nothing is decided.
        resize_on_device: Whether workers leave resizing to the device.
        model: Its preprocessing is the one that is measured.
        device: Of the stubbed model.
        num_workers: Processes that decode, or copy.
        shard: All shards are this file, under other names.
        num_start_shards: How many come first, and do not count.
        num_shards: How many count.
        num_samples: How many samples these have in all.
        rounds: How often all is run.
        folder: Where outputs go, on the file system of the shard.
    """

    mode: Mode
    image_size: int
    batch_size: int
    views: Views | None = None
    kept: float | None = None
    resize_on_device: bool = False
    model: Path
    device: str
    num_workers: int
    shard: Path
    num_start_shards: int
    num_shards: int
    num_samples: int
    rounds: int
    folder: Path

    @property
    def name(self) -> str:
        views = f" {self.views}" if self.views else ""
        kept = f" {self.kept:.0%}" if self.kept else ""
        resize = " resized on device" if self.resize_on_device else ""
        return f"{self.mode}{views}{kept}{resize}, {self.image_size} px, batch {self.batch_size}"

    @property
    def image_transform(self) -> v2.Compose | None:
        return TRAIN_VIEW if self.views == "float32" else None

    @cached_property
    def scorer(self) -> ClipScorer:
        kept = 1.0 if self.kept is None else self.kept
        return stub_scorer(self.model, device=self.device, kept=kept, resize_on_device=self.resize_on_device)


class Measured(NamedTuple):
    """What was read.

    Attributes:
        rounds: CPU seconds of the counted samples, in each round.
        stages: Microseconds per sample of each stage of a worker and of bare decoding, each several times.
    """

    rounds: list[CpuTimes]
    stages: list[dict[str, float]]


def measure(job: Job) -> Measured:
    """Run it, in a process where nothing else runs.

    A round is two whole runs, one over the first shards alone and one over all. Their difference is that of the counted
    samples, without what it takes to start and to end.
    """
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader workers, as it is by default on Linux
    transformers_logging.disable_progress_bar()
    clocks = Clocks()
    num_before = job.rounds // 2 + 1
    stages = _stage_times(job, num_before)
    rounds = []
    with tempfile.TemporaryDirectory(dir=job.folder) as name:
        shards = _link(job, Path(name, "shards"))
        first = shards[: job.num_start_shards]
        _spent(job, clocks, first)  # so that all that is loaded late is there
        for _ in range(job.rounds):
            least, most = (_spent(job, clocks, some) for some in (first, shards))
            rounds.append(most - least)
    return Measured(rounds, stages + _stage_times(job, job.rounds - num_before))


def _stage_times(job: Job, repeats: int) -> list[dict[str, float]]:
    work = Work(
        preprocess=job.scorer.preprocess,
        shard=job.shard,
        batch_size=job.batch_size,
        image_transform=job.image_transform,
        interleaved=job.views != "uint8",  # training takes these as they are
    )
    return stage_times(work, repeats=repeats)


def _link(job: Job, folder: Path) -> list[Path]:
    folder.mkdir()
    shards = [folder / f"{number:05d}.tar" for number in range(job.num_start_shards + job.num_shards)]
    for shard in shards:
        os.link(job.shard, shard)
    return shards


def _spent(job: Job, clocks: Clocks, shards: list[Path]) -> CpuTimes:
    """What a run over these shards takes."""
    with tempfile.TemporaryDirectory(dir=job.folder) as name:
        run = _RUNS[job.mode](job, shards, Path(name))
        gc.collect()
        before = clocks.read()
        run()
        return clocks.read() - before


def _rewrite(job: Job, shards: list[Path], folder: Path) -> Callable[[], Any]:
    config = RewriteConfig(shards=shards, output=folder / "out", threshold=THRESHOLD, **_workers(job))
    return partial(process_shards, config, job.scorer)


def _score(job: Job, shards: list[Path], folder: Path) -> Callable[[], Any]:
    return partial(process_shards, ScoreConfig(shards=shards, output=folder / "out", **_workers(job)), job.scorer)


def _from_scores(job: Job, shards: list[Path], folder: Path) -> Callable[[], Any]:
    assert job.kept is not None
    scores, workers = folder / "scores", _workers(job)
    _write_scores(shards, scores, kept=job.kept)
    config = RewriteConfig(shards=shards, output=folder / "out", scores=scores, threshold=THRESHOLD, **workers)
    return partial(process_shards, config)


def _inline(job: Job, shards: list[Path], folder: Path) -> Callable[[], Any]:
    def run() -> None:
        dataset = ClipWebDataset(shards, job.scorer.preprocess, image_transform=job.image_transform)
        loader = ClipFilterLoader(
            dataset, job.scorer, threshold=THRESHOLD, score_batch_size=job.batch_size, **_workers(job)
        )
        for _ in loader:  # nobody trains on it
            pass

    return run


#: What is run over shards, with this folder for what it reads beside them and writes.
_RUNS: dict[Mode, Callable[[Job, list[Path], Path], Callable[[], Any]]] = {
    "rewrite": _rewrite,
    "score": _score,
    "inline": _inline,
    "from_scores": _from_scores,
}


def _workers(job: Job) -> dict[str, Any]:
    return {"batch_size": job.batch_size, "num_workers": job.num_workers}


def _write_scores(shards: list[Path], folder: Path, *, kept: float) -> None:
    folder.mkdir()
    for shard in shards:
        with tarfile.open(shard) as tar:
            keys = [member.name.removesuffix(".jpg") for member in tar if member.name.endswith(".jpg")]
        rows = SampleRows.of(SampleRow(key, index) for index, key in enumerate(keys))
        is_kept = np.random.default_rng(0).random(len(rows)) < kept
        metadata = ScoreMetadata(
            shard=str(shard),
            num_bytes=shard.stat().st_size,
            num_samples=len(rows),
            torn=False,
            fingerprint={"model": "none", "precision": "fp32"},
        )
        with (folder / f"{shard.stem}.parquet").open("wb") as file:
            ShardScores.from_rows(rows, np.where(is_kept, 0.35, 0.15).astype(np.float32), metadata).write(file)
