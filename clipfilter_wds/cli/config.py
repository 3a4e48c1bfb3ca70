"""Says what a command shows and logs. Imports nothing."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """What is shown.

    Attributes:
        quiet: Print nothing but errors.
    """

    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Log of the run.

    Attributes:
        log_to: Log speed, counts and reasons while the run works: to csv, tensorboard, wandb or mlflow, in ``_logs`` of
            the output.
    """

    log_to: Literal["csv", "tensorboard", "wandb", "mlflow"] | None = None
