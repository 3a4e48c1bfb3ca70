"""Which of how many processes this is. The only file that reads rank variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's place among the processes that share one job.

    Read once in the parent process with :meth:`from_env` and handed down: a DataLoader worker may see ``WORLD_SIZE``
    without ``RANK``, so workers never read the environment.

    Raises:
        ValueError: When ``rank`` does not lie in ``[0, world_size)``.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank} and world_size {self.world_size}; rank must lie in [0, world_size)")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "World":
        """The world that ``torchrun`` or Lightning describe in the environment, else a world of one."""
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return cls(rank=int(environ["RANK"]), world_size=int(environ["WORLD_SIZE"]))
        return cls()
