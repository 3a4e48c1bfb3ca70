"""Checks the options of a run over shards. Imports neither torch nor pyarrow."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from clipfilter_wds.offline.limit import first_samples
from clipfilter_wds.preprocess.json_columns import JsonColumns
from clipfilter_wds.scores.groups import Groups
from clipfilter_wds.scores.kind import COSINES, ScoreKind
from clipfilter_wds.scores.metadata import Embeddings
from clipfilter_wds.scores.selection import Choice
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.scores.where import Where
from clipfilter_wds.shards.names import output_names, shard_folder, unnameable
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.shards.urls import FoundShards, MissingShardError, ask_for_missing, find_shards
from clipfilter_wds.storage.paths import AnyPath, any_path, folder_identity
from clipfilter_wds.storage.publish import check_writable
from clipfilter_wds.workers.config import WorkerConfig


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(WorkerConfig):
    """Input and output of ``score``.

    Such a run writes a score table for every shard, and no samples. Creating a config checks all that can be checked
    without a model, and writes nothing.

    Attributes:
        shards: A path, a folder, a glob or a brace range, or several of these: separated by commas or ``::``, as a
            list, or as ``@file.txt`` with one per line; local or on any fsspec storage.
        output: Folder to write to. A run that was stopped resumes when it is started again.
        caption: Extension of the member that holds the caption (``txt``), or a field of the json member
            (``json:caption``, ``json:meta.caption``). Several of these, separated by commas, are several captions of an
            image.
        image: Extension of the member that holds the image (``input.jpg``); of several, separated by commas, the first
            that a sample has. By default jpg, jpeg, png, webp, bmp, gif, tif, tiff, ppm, jp2, avif, jfif.
        embeddings: Save the embeddings of images and captions too, beside the score tables, as fp16 or fp32: per shard
            and tower a ``.npy`` with a row for each sample.
        columns: Fields of the json member to put into the score tables, to select by:
            ``json:punsafe,json:LANGUAGE=text``. Each is a number, unless =integer, =text or =bool says otherwise.
        skip_missing_shards: Leave out shards that are named and not there, such as those that a brace range spans, and
            say which. Without it, they are an error.
        limit: Try it on the first N samples: shards behind them are left out, and what is behind them in the last shard
            is dropped as ``not_in_subset``. A full run never resumes or uses such an output.
        overwrite: Delete what a run with other settings, or of another shard with the same name, has left in the
            output, instead of refusing to write there. What the same settings have written stays, and is resumed.
        dry_run: Write nothing, and say what would be read, written and, by scores that were made before, kept.

    Raises:
        ValueError: When an option can't be used.
    """

    shards: str | Path | Sequence[str | Path]
    output: str | Path
    caption: str = "txt"
    image: str | None = None
    embeddings: Embeddings | None = None
    columns: str | None = None
    skip_missing_shards: bool = False
    limit: int | None = None
    overwrite: bool = False
    dry_run: bool = False

    #: Options whose text lists several things, separated by commas. In YAML they may be lists.
    comma_lists = frozenset({"caption", "image", "columns"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embeddings not in (None, *get_args(Embeddings)):
            raise ValueError(f"embeddings is {self.embeddings!r}; use fp16 or fp32, or leave it out")
        _ = self.layout  # checks itself
        if self.column_sources:
            from clipfilter_wds.scores.table import table_schema  # imports pyarrow, for this alone

            table_schema(self.column_sources)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")
        _check_apart(self.names, self.folder)
        if not self.dry_run or isinstance(self.folder, Path):  # other storage is tried by writing to it
            check_writable(self.folder)

    @cached_property
    def _found(self) -> FoundShards:
        try:
            found = find_shards(self.shards, skip_missing=self.skip_missing_shards)
        except MissingShardError as error:
            raise ValueError(f"{error}{self._hint_on_missing()}") from None
        return ask_for_missing(found) if self.skip_missing_shards else found

    def _hint_on_missing(self) -> str:
        """The option that leaves out what is missing, where that leaves any shard."""
        try:
            find_shards(self.shards, skip_missing=True)
        except ValueError:
            return ""
        return "; --skip_missing_shards leaves out what is missing"

    @property
    def missing(self) -> list[str]:
        """The shards that are named and not there, and left out."""
        return self._found.missing

    @cached_property
    def unnameable(self) -> dict[str, str]:
        """The shards that fail because no output can be named after them, and why."""
        return unnameable(self._found.urls)

    @cached_property
    def urls(self) -> list[str]:
        """The shards to read, each once."""
        urls = [url for url in self._found.urls if url not in self.unnameable]
        if not urls:
            raise ValueError(next(iter(self.unnameable.values())))
        return urls if self.limit is None else list(self.first_samples)

    @cached_property
    def first_samples(self) -> dict[str, int]:
        """With a limit, per shard that is read, how many of its first samples are scored."""
        urls = [url for url in self._found.urls if url not in self.unnameable]
        return {} if self.limit is None else first_samples(urls, self.limit, self.layout)

    @cached_property
    def names(self) -> dict[str, str]:
        """Per shard, its name in the output folder, without suffix."""
        return output_names(self.urls)

    @property
    def folder(self) -> AnyPath:
        """The output folder."""
        return any_path(self.output)

    @property
    def table_folder(self) -> AnyPath:
        """Where score tables are written."""
        return self.folder

    @property
    def layout(self) -> SampleLayout:
        """Where image and caption are."""
        return SampleLayout(caption=self.caption, image=self.image)

    @cached_property
    def json_columns(self) -> JsonColumns | None:
        """Fields of the json member that become columns of the tables."""
        return None if self.columns is None else JsonColumns(self.columns)

    @property
    def column_sources(self) -> tuple[str, ...]:
        """These, as score tables name them."""
        return () if self.json_columns is None else self.json_columns.sources

    @property
    def settings(self) -> dict[str, Any]:
        """What the summary says of the options."""
        return {"threshold": None}


@dataclass(frozen=True, kw_only=True)
class RewriteConfig(ScoreConfig):
    """Input, output and choice of ``rewrite``.

    Such a run also writes shards of the kept samples.

    Attributes:
        threshold: Keep a pair when its cosine similarity, clipped to [0, 1], is at least this; 0.25 where no
            ``keep_fraction``, ``subset`` or ``where`` is given. Scores of another kind are compared as they are, and
            have no default.
        keep_fraction: Keep this share of all pairs that can be scored, those with the highest scores.
        subset: Keep only what this file lists: a ``.npy`` of uids like DataComp's, or a text file with a key per line.
        where: Keep only what meets this condition on the columns of the score tables, such as
            ``width >= 200 and num_tokens > 3``.
        group_by: Column of the score tables whose values make groups: ``keep_fraction`` is then one of each group.
        group_limits: Fractions, or thresholds, of some groups: ``en=0.3,de=0.5``; the others have that of all.
        scores: Folder of score tables that were made before; then no model is loaded and no image decoded.
        samples_per_shard: Pack what is kept into shards of this many samples, ``00000.tar`` and so on; by default each
            input shard has an output shard of its own.
    """

    threshold: float | None = None
    keep_fraction: float | None = None
    subset: str | Path | None = None
    where: str | None = None
    group_by: str | None = None
    group_limits: str | None = None
    scores: str | Path | None = None
    samples_per_shard: int | None = None

    comma_lists = ScoreConfig.comma_lists | {"group_limits"}
    #: Options that exclude each other: where the first is typed, the second one in a file does not count.
    takes_place_of = (
        ("threshold", "keep_fraction"),
        ("keep_fraction", "threshold"),
        ("scores", "limit"),
        ("scores", "embeddings"),
        ("scores", "columns"),
    )

    def __post_init__(self) -> None:
        self._check_columns(self.choice)
        if self.samples_per_shard is not None and self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}; it must be at least 1")
        if self.limit is not None and self.scores is not None:
            raise ValueError("limit says what is scored, and scores names what was scored before; give one")
        for name in ("embeddings", "columns"):
            if getattr(self, name) is not None and self.scores is not None:
                raise ValueError(
                    f"{name} are saved when shards are scored, and scores names what was scored before; give one"
                )
        if self.scores is not None:
            _check_not_scores(self.folder, any_path(self.scores))
        super().__post_init__()

    @cached_property
    def choice(self) -> Choice:
        """What is kept."""
        subset = None if self.subset is None else Subset(Path(self.subset))
        where = None if self.where is None else Where(self.where)
        is_default = self.threshold is None and self.keep_fraction is None and subset is None and where is None
        if self.group_limits is not None and self.group_by is None:
            raise ValueError("group_limits names groups, and group_by no column whose values they are")
        groups = None if self.group_by is None else Groups.parse(self.group_by, self.group_limits)
        kind = self._kind
        threshold = kind.resolve_threshold("auto" if is_default else self.threshold)
        return Choice(
            threshold=threshold, keep_fraction=self.keep_fraction, subset=subset, kind=kind, where=where, groups=groups
        )

    def _check_columns(self, choice: Choice) -> None:
        """See that the tables have the columns that are named."""
        if choice.where is None and choice.groups is None:
            return
        from clipfilter_wds.scores.folder import schema_of_scores  # imports pyarrow, for this alone
        from clipfilter_wds.scores.table import table_schema

        schema = table_schema(self.column_sources) if self.scores is None else schema_of_scores(self.scores)
        if schema is not None and choice.where is not None:
            choice.where.check(schema)
        if schema is not None and choice.groups is not None and choice.groups.column not in schema.names:
            names = ", ".join(schema.names)
            raise ValueError(f"group_by: there is no column {choice.groups.column!r}; the tables have {names}")

    @property
    def _kind(self) -> ScoreKind:
        """What the scores are."""
        if self.scores is None:
            return COSINES
        from clipfilter_wds.scores.folder import kind_of_scores  # imports pyarrow, for this alone

        return kind_of_scores(self.scores)

    @property
    def table_folder(self) -> AnyPath:
        """Where score tables are written."""
        return self.folder / "_scores"

    @property
    def needs_all_scores(self) -> bool:
        """Whether nothing can be copied before everything is scored."""
        return self.keep_fraction is not None or self.samples_per_shard is not None

    @property
    def settings(self) -> dict[str, Any]:
        """What the summary says of the options."""
        scores = None if self.scores is None else str(self.scores)
        return {**self.choice.settings, "samples_per_shard": self.samples_per_shard, "scores": scores}


def _check_not_scores(folder: AnyPath, scores: AnyPath) -> None:
    """Refuse to write beside the tables of ``score``, whose summary would be replaced; a rewrite's lie in a folder."""
    if folder_identity(folder) == folder_identity(scores) and not any((scores / "_scores").rglob("*.parquet")):
        raise ValueError(f"output {str(folder)!r} is the folder of the scores, which have a summary; choose another")


def _check_apart(names: dict[str, str], folder: AnyPath) -> None:
    inputs = {shard_folder(url) for url in names}
    outputs = {folder_identity((folder / name).parent) for name in names.values()} | {folder_identity(folder)}
    if clash := inputs & outputs:
        raise ValueError(f"output {str(folder)!r} would write into {clash.pop()!r}, which holds input; choose another")
