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
        ray_address: Of a running Ray cluster (``auto``: the one of this machine); by default Ray is started here.
        cpus_per_task: CPUs of each Ray actor; by default the GPUs share them equally, and without GPUs it is 1.
        rank_timeout: Under torchrun or srun, seconds to wait for the other ranks without a sign of progress.

    Raises:
        ValueError: When an option for Ray is given without Ray.
    """

    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    cpus_per_task: int | None = None
    rank_timeout: float = DEFAULT_RANK_TIMEOUT

    def __post_init__(self) -> None:
        if self.engine != "ray" and (self.ray_address is not None or self.cpus_per_task is not None):
            raise ValueError("ray_address and cpus_per_task are for --engine ray")
