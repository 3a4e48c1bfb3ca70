"""Checks the options of an export. Imports neither torch nor pyarrow."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from clipfilter_wds.scores.apart import check_apart
from clipfilter_wds.storage.paths import AnyPath, any_path
from clipfilter_wds.storage.publish import check_writable

Layout = Literal["clip_retrieval", "datacomp"]
DataCompModel = Literal["b32", "l14"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Input and output of ``export``.

    Attributes:
        scores: The output folder of ``score`` or ``rewrite``, made with ``embeddings``.
        output: Folder to write to; it must be empty.
        format: ``clip_retrieval``: ``img_emb/``, ``text_emb/`` and ``metadata/``; or ``datacomp``: an ``.npz`` of
            embeddings and a ``.parquet`` of metadata per shard.
        datacomp_model: How DataComp calls the model: ``b32`` (ViT-B/32) or ``l14`` (ViT-L/14, the default); for
            ``datacomp`` alone.

    Raises:
        ValueError: When an option can't be used.
    """

    scores: str | Path
    output: str | Path
    format: Layout
    datacomp_model: DataCompModel | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("format", get_args(Layout)), ("datacomp_model", (None, *get_args(DataCompModel)))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {' or '.join(filter(None, kinds))}")
        if self.datacomp_model is not None and self.format != "datacomp":
            raise ValueError(
                f"datacomp_model is for format 'datacomp', and format is {self.format!r}; leave datacomp_model out"
            )
        check_writable(self.folder)
        check_apart(self.folder, self.scores)
        if any(True for _ in self.folder.rglob("*")):
            raise ValueError(f"output {str(self.folder)!r} is not empty; choose another folder")

    @property
    def folder(self) -> AnyPath:
        """The output folder."""
        return any_path(self.output)
