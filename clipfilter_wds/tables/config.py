"""Checks the options of a run over a table. Imports neither torch nor pyarrow."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clipfilter_wds.scores.kind import DEFAULT_THRESHOLD
from clipfilter_wds.scores.selection import Choice
from clipfilter_wds.storage.publish import check_writable
from clipfilter_wds.tables.formats.open import SUFFIXES
from clipfilter_wds.workers.config import WorkerConfig


@dataclass(frozen=True, kw_only=True)
class TableConfig(WorkerConfig):
    """Input, output and choice of ``table``.

    Creating a config checks all that can be checked without reading the table, and writes nothing.

    Attributes:
        input: A .jsonl, .csv, .tsv, .parquet or .json file on this machine. Relative image paths start from its folder.
        output: File to write, of any of these types. One that exists is replaced when the run is done, but
            for a score table.
        image_key: Column of the images: paths, ``http(s)://`` and other fsspec URLs, or the bytes of image files.
        caption_key: Column of the captions.
        threshold: Keep a row when its cosine similarity, clipped to [0, 1], is at least this (default: 0.25); not with
            ``keep_fraction``.
        keep_fraction: Keep this share of all rows that can be scored, those with the highest scores.
        score_key: Name of a column to add for the similarity, such as ``clip_score``; by default none is added.

    Raises:
        ValueError: When an option can't be used.
    """

    input: str | Path
    output: str | Path
    image_key: str = "image"
    caption_key: str = "caption"
    threshold: float | None = None
    keep_fraction: float | None = None
    score_key: str | None = None

    #: Options that exclude each other: where the first is typed, the second one in a file does not count.
    takes_place_of = (("threshold", "keep_fraction"), ("keep_fraction", "threshold"))

    def __post_init__(self) -> None:
        _ = self.choice  # checks itself
        super().__post_init__()
        if self.score_key is not None and not self.score_key:
            raise ValueError("score_key is empty; name the column that the score is written to, such as clip_score")
        _check_local(input=self.input, output=self.output)
        _check_types(self.source, self.target)
        if not self.source.is_file():
            raise ValueError(f"input {str(self.source)!r} is no file")
        check_writable(self.target, as_file=True)
        if self.target.exists() and self.target.samefile(self.source):
            raise ValueError(f"output {str(self.target)!r} is the input itself; choose another")
        _check_no_scores(self.target)

    @cached_property
    def choice(self) -> Choice:
        """What is kept."""
        is_default = self.threshold is None and self.keep_fraction is None
        threshold = DEFAULT_THRESHOLD if is_default else self.threshold
        return Choice(threshold=threshold, keep_fraction=self.keep_fraction)

    @property
    def converts(self) -> bool:
        """Whether the output is of another type than the input."""
        return self.source.suffix.lower() != self.target.suffix.lower()

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
    for name, path in (("input", source), ("output", target)):
        if path.suffix.lower() not in SUFFIXES:
            hint = "; shards are for the commands rewrite and score" if ".tar" in path.suffixes else ""
            raise ValueError(f"{name} {str(path)!r} is no {', '.join(SUFFIXES)} file{hint}")


def _check_no_scores(target: Path) -> None:
    """Refuse to replace a shard's score table."""
    if target.suffix.lower() != ".parquet" or not target.is_file():
        return
    from clipfilter_wds.scores.table import read_metadata  # imports pyarrow, for this alone

    try:
        shard = read_metadata(target).shard
    except ValueError:
        return  # it is another table, or none
    raise ValueError(
        f"output {str(target)!r} is the score table of {shard!r}, which is not replaced; name another file"
    )
