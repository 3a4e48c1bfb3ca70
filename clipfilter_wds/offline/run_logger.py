"""Logs how a run goes, with a logger of Lightning."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from clipfilter_wds.offline.tally import Tally
from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.paths import AnyPath

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LogTo = Literal["csv", "tensorboard", "wandb", "mlflow"]

#: Folder within the output, and the one in the current folder where the output is on another storage.
LOG_FOLDER, _LOCAL_FOLDER = "_logs", "clipfilter_logs"
#: What services call all runs together.
_PROJECT = "clipfilter-wds"
#: Seconds between two points.
_SECONDS = 2.0

_log = logging.getLogger(__name__)


class RunLogger:
    """Logs a run's pace, counts and reasons, over seconds. Use it in a ``with`` block.

    Once it has begun, an error of the logger ends the log with a warning, and never the run.

    Args:
        log_to: What kind of logger.
        output: The run's output folder. The log is in ``_logs`` there, or in ``clipfilter_logs`` of the current folder
            when the output is not on this machine.
        settings: The run's options.

    Raises:
        ValueError: When the logger's package is not installed, or it can't begin.
    """

    def __init__(self, log_to: LogTo, output: AnyPath, settings: Mapping[str, Any]) -> None:
        folder = output / LOG_FOLDER if isinstance(output, Path) else Path(_LOCAL_FOLDER)
        try:
            self._logger: Logger | None = _make(log_to, folder, output.name)
            self._logger.log_hyperparams({name: _plain(value) for name, value in settings.items()})
        except ModuleNotFoundError as error:
            raise ValueError(f"log_to {log_to} needs a package that is not installed: pip install {log_to}") from error
        except Exception as error:
            raise ValueError(f"can't log to {log_to}: {' '.join(str(error).split())}; or leave out log_to") from error
        self._next_at = time.monotonic()

    def on_progress(self, tally: Tally) -> None:
        """Log how far the run is, unless it was just done."""
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _SECONDS
            self.log(tally)

    def log(self, tally: Tally) -> None:
        """Log how far the run is."""
        if self._logger is None:
            return
        try:
            self._logger.log_metrics(metrics_of(tally), step=round(tally.seconds))
            self._logger.save()
        except Exception as error:  # noqa: BLE001  # each kind has errors of its own
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._logger = None
        _log.warning("the run goes on without its log: %s", " ".join(str(error).split()) or type(error).__name__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        if self._logger is None:
            return
        try:
            self._logger.finalize("success" if kind is None else "failed")
        except Exception as error:  # noqa: BLE001  # likewise
            self._give_up(error)


def metrics_of(tally: Tally) -> dict[str, float]:
    """What is logged of a run: of the shards that are done, but for the pace."""
    counts = tally.counts
    return {
        "samples_per_second": tally.samples_per_second,
        "shards": tally.done,
        "failed_shards": len(tally.failed),
        "seen": counts.seen,
        "kept": counts.kept,
        "keep_rate": counts.keep_rate,
        "rechecked_share": tally.stats.rechecked / max(counts.seen, 1),
        **{f"dropped/{reason}": count for reason, count in counts.dropped.items()},
    }


def _make(log_to: LogTo, folder: Path, run: str) -> "Logger":
    from lightning.pytorch import loggers

    folder.mkdir(parents=True, exist_ok=True)
    match log_to:
        case "csv":
            return loggers.CSVLogger(folder, name=log_to)
        case "tensorboard":
            return loggers.TensorBoardLogger(folder, name=log_to, default_hp_metric=False)
        case "wandb":
            return loggers.WandbLogger(project=_PROJECT, name=run, save_dir=folder)
        case "mlflow":
            # Newer mlflow refuses to keep runs as plain files.
            tracking = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{(folder / 'mlflow.db').absolute()}")
            return loggers.MLFlowLogger(_PROJECT, run_name=run, tracking_uri=tracking)


def _plain(value: Any) -> Any:
    """A setting as any logger takes it, and without the secrets of URLs."""
    if isinstance(value, str | Path):
        return without_secrets(str(value))
    return ", ".join(map(str, map(_plain, value))) if isinstance(value, Sequence) else value
