"""Says what a command shows and logs."""

from dataclasses import dataclass

from clipfilter_wds.offline.run_logger import LogTo


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

    log_to: LogTo | None = None
