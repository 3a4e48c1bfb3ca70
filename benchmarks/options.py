"""What a benchmark is told."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.material import Data, Size, make_data, make_model
from clipfilter_wds.models.device import resolve_device
from clipfilter_wds.workers.cpus import default_num_workers


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Attributes:
        size: The model; its weights are random.
        image_size: Side of the JPEGs, in pixels.
        num_samples: Samples of a turn of the fastest contenders; slower ones take fewer.
        rounds: Turns of each contender; None is what suits the benchmark, 3 or 5.
        batch_size: Samples per forward pass.
        num_workers: Processes that decode, for everyone; None is what the commands choose.
        device: auto, cpu, cuda or cuda:1.
        compile: Measure the scorer, and the limit, with torch.compile as well; compiling takes a minute or so.
        quick: Measure ``host`` and ``gpu`` on so few samples that nothing follows from it but that they run.
        budget: Seconds that ``gpu`` may take; parts that would take longer than is left are left for the next call.
        only: Measure only the contenders whose names hold one of these words.
        output: Folder of the JSON and the plots.
        cache: Folder of models and data; they are made when they are not there.
    """

    size: Size = "vit-b-32"
    image_size: int = 512
    num_samples: int = 512
    rounds: int | None = None
    batch_size: int = 64
    num_workers: int | None = None
    device: str = "auto"
    compile: bool = False
    quick: bool = False
    budget: float = 240.0
    only: list[str] | None = None
    output: Path = Path("benchmark_results")
    cache: Path = Path.home() / ".cache" / "clipfilter_wds" / "benchmarks"

    @property
    def torch_device(self) -> torch.device:
        return resolve_device(self.device)

    def turns(self, usual: int = 3) -> int:
        """Turns of each contender."""
        return usual if self.rounds is None else self.rounds

    @property
    def workers(self) -> int:
        """Processes that decode."""
        return default_num_workers(self.torch_device) if self.num_workers is None else self.num_workers

    @property
    def cores(self) -> int:
        """Cores that this process may use."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @cached_property
    def model(self) -> Path:
        return make_model(self.cache, self.size)

    def data(self, share: float = 1.0) -> Data:
        """The first samples."""
        number = max(1, round(self.num_samples * share))
        return make_data(self.cache, num_samples=number, image_size=self.image_size)

    def wants(self, name: str) -> bool:
        """Whether the contender of this name is to be measured."""
        return self.only is None or any(word in name for word in self.only)
