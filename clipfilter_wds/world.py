"""Which of how many processes this is, and what the processes agree on. The only file that reads rank variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's place among the processes that share one job.

    Read once in the parent process with :meth:`from_env` and handed down: a DataLoader worker may see ``WORLD_SIZE``
    without ``RANK``, so workers never read the environment.

    Attributes:
        rank: Which process of the job this is.
        world_size: How many there are.
        local_rank: Which of those on this machine it is; it takes the GPU of that number.
        local_world_size: How many share this machine's processors.

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
        """The world that ``torchrun``, Lightning or ``srun`` describe in the environment, else a world of one."""
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return cls(
                rank=int(environ["RANK"]),
                world_size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", 0)),
                local_world_size=int(environ.get("LOCAL_WORLD_SIZE", 1)),
            )
        # Only srun sets the size of a step; a batch script that calls a command without it is one process.
        if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
            return cls(
                rank=int(environ["SLURM_PROCID"]),
                world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
                local_rank=int(environ.get("SLURM_LOCALID", 0)),
            )
        return cls()

    def claim_gpu(self) -> None:
        """Make ``cuda`` mean a GPU of this rank's own, where the machine's ranks have one each."""
        if self.world_size > 1 and torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())

    @classmethod
    def current(cls) -> "World":
        """The world of ``torch.distributed`` where that is initialised, else that of the environment."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(rank=distributed.get_rank(), world_size=distributed.get_world_size())
        return cls.from_env()


class Agreement:
    """Lets the ranks of a world tell each other something, over a process group of its own on the CPU.

    Every rank must create it, and make each exchange, together. In a world of one nothing is sent.

    Args:
        world: This rank among all.

    Raises:
        ValueError: When there are several ranks and ``torch.distributed`` is not initialised.
    """

    def __init__(self, world: World) -> None:
        self._group: Any = None
        if world.world_size > 1:
            if not distributed.is_initialized():
                raise ValueError(
                    f"this is rank {world.rank} of {world.world_size}, and the ranks must agree on when an epoch ends; "
                    "call torch.distributed.init_process_group() before you iterate"
                )
            self._group = distributed.new_group(backend="gloo")

    def lowest(self, value: int) -> int:
        """The lowest of all ranks' values."""
        if self._group is None:
            return value
        lowest = torch.tensor(value)
        distributed.all_reduce(lowest, distributed.ReduceOp.MIN, group=self._group)
        return int(lowest)

    def gather(self, value: Any) -> list[Any]:
        """What every rank says, in the order of the ranks."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(values, value, group=self._group)
        return values
