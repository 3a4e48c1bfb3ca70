"""Checks the options that say where shards are processed. Imports nothing."""

from dataclasses import dataclass
from typing import Literal

DEFAULT_RANK_TIMEOUT = 1800.0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where shards are processed.

    Attributes:
        engine: ``local`` processes the shards on this machine, or under torchrun or srun a rank's share of them;
            ``ray`` on a Ray cluster. The output is the same.
        ray_address: Address of a running Ray cluster, auto for this machine's; by default Ray is started here.
        devices: How many devices of this machine share the run, a process for each: auto for all GPUs, or a number.
            Without GPUs, so many processes share the CPUs. ``num_workers`` is that of each process.
        cpus_per_task: CPUs of each Ray actor; by default the GPUs share them equally, and without GPUs it is 1.
        rank_timeout: Under torchrun or srun, seconds to wait for the other ranks without a sign of progress.

    Raises:
        ValueError: When an option for Ray is given without Ray, or another one with it, or ``devices`` can't be used.
    """

    engine: Literal["local", "ray"] = "local"
    devices: Literal["auto"] | int | None = None
    ray_address: str | None = None
    cpus_per_task: int | None = None
    rank_timeout: float = DEFAULT_RANK_TIMEOUT

    def __post_init__(self) -> None:
        if self.engine != "ray" and (self.ray_address is not None or self.cpus_per_task is not None):
            raise ValueError("ray_address and cpus_per_task are for --engine ray")
        if self.devices is None:
            return
        if self.engine == "ray":
            raise ValueError("devices is for runs without Ray; with --engine ray every GPU has an actor")
        if self.devices != "auto" and not (isinstance(self.devices, int) and self.devices >= 1):
            raise ValueError(f"devices is {self.devices!r}; use auto, or a number of at least 1")
