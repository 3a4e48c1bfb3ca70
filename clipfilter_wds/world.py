"""Tells which of how many ranks this process is, and lets the ranks agree.

Only this file reads what launchers tell in the environment. torch is imported when it is needed, so that commands that
need none start quickly.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's place among the processes that share one job.

    Read once in the parent process with :meth:`from_env` and passed down: a DataLoader worker may see ``WORLD_SIZE``
    without ``RANK``, so workers never read the environment.

    Attributes:
        rank: Which process of the job this is.
        world_size: How many there are.
        local_rank: Which of those on this machine it is; it uses the GPU of that number.
        local_world_size: How many share this machine's CPUs.

    Raises:
        ValueError: When ``rank`` does not lie in ``[0, world_size)``.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank} and world_size {self.world_size}; rank must lie in [0, world_size)")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "World":
        """The world that ``torchrun``, Lightning or ``srun`` describe in the environment, or a world of one.

        Raises:
            ValueError: When a variable holds no number, or a rank is empty where there are several.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ and _is_one_of_several(environ):
            return cls(
                rank=_number(environ, "RANK"),
                world_size=_number(environ, "WORLD_SIZE"),
                local_rank=_number(environ, "LOCAL_RANK", 0),
                local_world_size=_number(environ, "LOCAL_WORLD_SIZE", 1),
            )
        # Only srun sets the size of a step; a batch script that runs a command without srun is one process.
        if environ.get("SLURM_PROCID") and environ.get("SLURM_STEP_NUM_TASKS"):
            return cls(
                rank=_number(environ, "SLURM_PROCID"),
                world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
                local_rank=_number(environ, "SLURM_LOCALID", 0),
            )
        return cls()

    def claim_gpu(self) -> None:
        """Make ``cuda`` mean this rank's own GPU, where the machine has one for each rank."""
        if self.world_size == 1:
            return
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())

    @classmethod
    def current(cls) -> "World":
        """The world of ``torch.distributed`` where that is initialised, or that of the environment."""
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(rank=torch.distributed.get_rank(), world_size=torch.distributed.get_world_size())
        return cls.from_env()


def _is_one_of_several(environ: Mapping[str, str]) -> bool:
    """Whether rank and size are said; a script that exports both, or the rank of one process, as empty says neither."""
    return bool(environ["RANK"].strip()) or environ["WORLD_SIZE"].strip() not in ("", "1")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "").strip()
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        pair = (f"{key}={environ[key]!r}" for key in ("RANK", "WORLD_SIZE") if key in environ and key != name)
        raise ValueError(
            f"the environment has {' beside '.join([f'{name}={environ.get(name)!r}', *pair])}; a launcher sets it to a "
            f"whole number. Set it to this process's, or `unset {name}`"
        ) from None


class Agreement:
    """Lets the ranks of a world exchange values, over a process group of its own on the CPU.

    All ranks must create it together, and call its methods together. In a world of one nothing is sent.

    Args:
        world: This rank among all.

    Raises:
        ValueError: When there are several ranks and ``torch.distributed`` is not initialised.
    """

    def __init__(self, world: World) -> None:
        self._group: Any = None
        if world.world_size > 1:
            import torch

            if not torch.distributed.is_initialized():
                raise ValueError(
                    f"this is rank {world.rank} of {world.world_size}, and the ranks must agree on when an epoch ends; "
                    "call torch.distributed.init_process_group() before you iterate"
                )
            self._group = torch.distributed.new_group(backend="gloo")

    def lowest(self, value: int) -> int:
        """The lowest of all ranks' values."""
        if self._group is None:
            return value
        import torch

        lowest = torch.tensor(value, device="cpu")
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=self._group)
        return int(lowest)

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values, in the order of the ranks."""
        if self._group is None:
            return [value]
        import torch

        values: list[Any] = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values


def ray_address(environ: Mapping[str, str] = os.environ) -> str | None:
    """The Ray cluster that the environment names, as it does in a job that was submitted to one; None without one."""
    return environ.get("RAY_ADDRESS") or None
