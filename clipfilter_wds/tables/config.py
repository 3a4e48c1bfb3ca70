"""Checks the options of a run over a table."""

from dataclasses import dataclass
from pathlib import Path

from clipfilter_wds.scores.selection import DEFAULT_THRESHOLD, check_threshold
from clipfilter_wds.storage.publish import check_writable
from clipfilter_wds.tables.formats.open import SUFFIXES
from clipfilter_wds.workers.config import DEFAULT_WORKER_TIMEOUT, check_worker_timeout


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """What a run over a table reads, keeps and writes.

    Creating one checks everything that can be checked without reading the table, and makes the output's folder.

    Attributes:
        input: A jsonl, csv, parquet or json file on this machine. Its folder is where relative image paths begin.
        output: File to write, of the same format as ``input``. An existing file is replaced when the run is done.
        image_key: Column of the images: paths, or ``http(s)://`` and other fsspec URLs.
        caption_key: Column of the captions.
        threshold: Keep a row when its score is at least this.
        score_key: Name of a column to add for the score; None adds none.
        batch_size: Rows per forward pass.
        num_workers: Processes that open images; None chooses by device and number of CPUs. With 0, this process opens
            them, and an image that crashes its decoder ends it.
        worker_timeout: Seconds that one image may take to be read and decoded; 0 means no limit. An image that takes
            longer, or kills the process that decodes it, is tried once more, and then has the reason ``decoder_crash``.

    Raises:
        ValueError: When one of them can't be used.
    """

    input: str | Path
    output: str | Path
    image_key: str = "image"
    caption_key: str = "caption"
    threshold: float = DEFAULT_THRESHOLD
    score_key: str | None = None
    batch_size: int = 64
    num_workers: int | None = None
    worker_timeout: float = DEFAULT_WORKER_TIMEOUT

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        check_worker_timeout(self.worker_timeout)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; it must not be negative")
        if self.score_key is not None and not self.score_key:
            raise ValueError("score_key is empty; name the column that the score is written to, such as clip_score")
        _check_local(input=self.input, output=self.output)
        _check_types(self.source, self.target)
        if not self.source.is_file():
            raise ValueError(f"input {str(self.source)!r} is no file")
        check_writable(self.target, as_file=True)
        if self.target.exists() and self.target.samefile(self.source):
            raise ValueError(f"output {str(self.target)!r} is the input itself; choose another")

    @property
    def source(self) -> Path:
        """The file to read."""
        return Path(self.input).expanduser()

    @property
    def target(self) -> Path:
        """The file to write."""
        return Path(self.output).expanduser()


def _check_local(**paths: str | Path) -> None:
    for name, path in paths.items():
        if "://" in str(path):
            raise ValueError(f"{name} is {str(path)!r}; tables are read and written on this machine only")


def _check_types(source: Path, target: Path) -> None:
    if source.suffix.lower() not in SUFFIXES:
        raise ValueError(f"input {str(source)!r} is no {', '.join(SUFFIXES)} file")
    if target.suffix.lower() != source.suffix.lower():
        raise ValueError(f"output {str(target)!r} gets the input's format; name it {target.stem + source.suffix!r}")
