"""What a run reads, keeps and writes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

from clipfilter_wds.offline.commit import OutputFiles
from clipfilter_wds.offline.copying import CopyOutput, Output, TableOutput
from clipfilter_wds.offline.scoring import ScoringOptions
from clipfilter_wds.scores.fraction import Cutoff
from clipfilter_wds.scores.selection import DEFAULT_THRESHOLD, Choice
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.shards.names import output_names, shard_folder
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.storage.paths import AnyPath, any_path, folder_identity
from clipfilter_wds.storage.publish import publish
from clipfilter_wds.workers.crashes import DEFAULT_WORKER_TIMEOUT, check_worker_timeout


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """A run that writes a score table per shard.

    Creating one checks all that can be checked without a model, and makes the output folder.

    Attributes:
        shards: Whatever ``expand_shards`` takes.
        output: Folder to write to; made if it is not there, never one that holds input.
        caption: Extension of the caption's member (``txt``), or ``json:FIELD``.
        batch_size: Samples per forward pass.
        num_workers: Processes that decode; None chooses by device and number of processors.
        worker_timeout: Seconds that one sample may take to decode; 0 is for ever. One that takes longer, or kills the
            process that decodes it, is tried once more and then dropped as ``decoder_crash``.

    Raises:
        ValueError: When one of them can't be used.
    """

    shards: str | Path | Sequence[str | Path]
    output: str | Path
    caption: str = "txt"
    batch_size: int = 64
    num_workers: int | None = None
    worker_timeout: float = DEFAULT_WORKER_TIMEOUT

    def __post_init__(self) -> None:
        check_worker_timeout(self.worker_timeout)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; it must not be negative")
        SampleLayout(caption=self.caption)
        _check_apart(self.names, self.folder)
        _check_writable(self.folder)

    @cached_property
    def urls(self) -> list[str]:
        """The shards to read, each once."""
        return expand_shards(self.shards)

    @cached_property
    def names(self) -> dict[str, str]:
        """Per shard, its name in the output folder, without suffix."""
        return output_names(self.urls)

    @property
    def folder(self) -> AnyPath:
        """The output folder."""
        return any_path(self.output)

    @property
    def layout(self) -> SampleLayout:
        """Where image and caption are."""
        return SampleLayout(caption=self.caption)

    @property
    def scoring(self) -> ScoringOptions:
        """How shards are scored."""
        return ScoringOptions(
            layout=self.layout,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            worker_timeout=self.worker_timeout,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the summary tells of the configuration."""
        return {"threshold": None}

    def outputs(self) -> Sequence[Output]:
        """Where the outcome of each shard goes."""
        return [TableOutput(url=url, table=self.folder / f"{name}.parquet") for url, name in self.names.items()]


@dataclass(frozen=True, kw_only=True)
class RewriteConfig(ScoreConfig):
    """A run that also writes the kept samples to shards.

    Attributes:
        threshold: Keep a pair when ``clip(cosine, 0, 1)`` is at least this; None is 0.25 where nothing else chooses.
        keep_fraction: Keep this share of the run's pairs that could be scored, those with the highest scores.
        subset: Keep only what this file lists; see ``Subset``.
        scores: Folder of the shards' score tables, made before; no model is needed then.
        samples_per_shard: Pack what is kept into shards of this many samples, ``00000.tar`` and so on; None writes a
            shard for each input shard.
    """

    threshold: float | None = None
    keep_fraction: float | None = None
    subset: str | Path | None = None
    scores: str | Path | None = None
    samples_per_shard: int | None = None

    def __post_init__(self) -> None:
        _ = self.choice  # checks itself
        if self.samples_per_shard is not None and self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}; it must be at least 1")
        super().__post_init__()

    @cached_property
    def choice(self) -> Choice:
        """What is kept."""
        subset = None if self.subset is None else Subset(Path(self.subset))
        is_default = self.threshold is None and self.keep_fraction is None and subset is None
        threshold = DEFAULT_THRESHOLD if is_default else self.threshold
        return Choice(threshold=threshold, keep_fraction=self.keep_fraction, subset=subset)

    @property
    def needs_all_scores(self) -> bool:
        """Whether nothing can be written before everything is scored."""
        return self.keep_fraction is not None or self.samples_per_shard is not None

    @property
    def scoring(self) -> ScoringOptions:
        """How shards are scored."""
        return replace(super().scoring, threshold=self.choice.threshold, subset=self.choice.subset)

    @property
    def settings(self) -> dict[str, Any]:
        """What the summary tells of the configuration."""
        return {**self.choice.settings, "samples_per_shard": self.samples_per_shard}

    def tables(self) -> Sequence[TableOutput]:
        """Where the scores of each shard go."""
        folder = self.folder / "_scores"
        return [TableOutput(url=url, table=folder / f"{name}.parquet") for url, name in self.names.items()]

    def outputs(self) -> Sequence[Output]:
        """Where the outcome of each shard goes."""
        return [self.copy_task(output.url, output.table) for output in self.tables()]

    def copy_task(self, url: str, table: AnyPath | None, cutoff: Cutoff | None = None) -> CopyOutput:
        """Where the outcome of a shard goes that has this table."""
        files = OutputFiles(folder=self.folder, name=self.names[url])
        return CopyOutput(url=url, files=files, table=table, choice=self.choice, cutoff=cutoff, layout=self.layout)


def _check_apart(names: dict[str, str], folder: AnyPath) -> None:
    inputs = {shard_folder(url) for url in names}
    outputs = {folder_identity((folder / name).parent) for name in names.values()} | {folder_identity(folder)}
    if clash := inputs & outputs:
        raise ValueError(f"output {str(folder)!r} would write into {clash.pop()!r}, which holds input; choose another")


def _check_writable(folder: AnyPath) -> None:
    try:
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        else:
            probe = folder / f".clipfilter-probe-{uuid4().hex}"
            with publish(probe):
                pass
            probe.unlink()
    except OSError as error:
        raise ValueError(f"can't write to output {str(folder)!r}: {error.strerror or error}") from error
