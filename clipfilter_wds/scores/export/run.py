"""Exports a folder of scores and embeddings, one shard at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter_wds.scores.embeddings import ShardEmbeddings
from clipfilter_wds.scores.export.config import ExportConfig
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.storage.publish import publish

#: Columns of score tables that DataComp's metadata has under other names; captions come of ``--columns``.
_DATACOMP_NAMES = {"width": "original_width", "height": "original_height", "caption": "text"}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """What is exported of a shard: the samples that have a score and an embedding.

    Attributes:
        number: Of the part.
        num_parts: Of the export.
        table: Their rows of the score table.
        embeddings: Row-aligned.
    """

    number: int
    num_parts: int
    table: pa.Table
    embeddings: ShardEmbeddings

    @property
    def suffix(self) -> str:
        """The number, with as many digits as clip-retrieval gives it."""
        return str(self.number).zfill(len(str(self.num_parts)))

    @property
    def uids(self) -> list[str]:
        """In hexadecimal digits; empty where there is none."""
        return ["" if uid is None else uid.hex() for uid in self.table["uid"].to_pylist()]


def export(config: ExportConfig) -> tuple[int, int]:
    """Write all that has a score. Memory is that of one shard.

    Returns:
        How many samples were written, and of how many shards.

    Raises:
        ValueError: When there are no tables, one has no embeddings, no sample has a score, one has no uid
            that DataComp would need, or there is another score of the same name.
        OSError: When the output can't be written.
    """
    write = _write_clip_retrieval if config.format == "clip_retrieval" else _write_datacomp
    num_samples = num_shards = 0
    for part in _parts(ScoreFolder(config.scores)):
        write(config, part)
        num_samples += part.table.num_rows
        num_shards += 1
    if not num_samples:
        raise ValueError(
            f"none of the samples in {str(config.scores)!r} has a score and an embedding; there is nothing to export"
        )
    return num_samples, num_shards


def _parts(folder: ScoreFolder) -> Iterator[_Part]:
    """Of each shard that has any; the others are left out, as both tools would."""
    for number, path in enumerate(folder.paths):
        scores = ShardScores.read(path)
        found = folder.embedding_files(path).read(scores.metadata)
        rows = np.flatnonzero(scores.usable & found.image.any(axis=1) & found.text.any(axis=1))
        if len(rows):
            embeddings = ShardEmbeddings(image=found.image[rows], text=found.text[rows])
            yield _Part(
                number=number, num_parts=len(folder.paths), table=scores.table.take(rows), embeddings=embeddings
            )


def _write_clip_retrieval(config: ExportConfig, part: _Part) -> None:
    for tower, array in (("img", part.embeddings.image), ("text", part.embeddings.text)):
        with publish(config.folder / f"{tower}_emb" / f"{tower}_emb_{part.suffix}.npy") as file:
            np.save(file, array)
    table = part.table.drop_columns(["reason", "uid"]).append_column("uid", pa.array(part.uids))
    _write_table(_renamed(table, {"key": "image_path"}), config.folder / "metadata" / f"metadata_{part.suffix}.parquet")


def _write_datacomp(config: ExportConfig, part: _Part) -> None:
    uids, model = part.uids, config.datacomp_model or "l14"
    if not all(uids):
        key = part.table["key"][uids.index("")].as_py()
        found = f"sample {key!r} has no uid in its json member"
        raise ValueError(f"{found}, by which DataComp tells samples apart; clip_retrieval needs none")
    score_name = f"clip_{model}_similarity_score"
    if score_name in part.table.column_names:
        raise ValueError(
            f"the tables have a column {score_name!r}, of the json member, and the scores would be called that too; "
            "choose another --datacomp_model, or score without that column"
        )
    arrays: dict[str, Any] = {f"{model}_img": part.embeddings.image, f"{model}_txt": part.embeddings.text}
    with publish(config.folder / f"{part.suffix}.npz") as file:
        np.savez(file, **arrays)
    table = _renamed(part.table.drop_columns(["reason", "uid"]), {**_DATACOMP_NAMES, "score": score_name})
    _write_table(table.add_column(0, "uid", pa.array(uids)), config.folder / f"{part.suffix}.parquet")


def _renamed(table: pa.Table, names: Mapping[str, str]) -> pa.Table:
    """With other names, except where a field of the json member has that name: it knows the original size."""
    taken = set(table.column_names)
    found = [(name, names.get(name, name)) for name in table.column_names]
    return table.rename_columns([name if other in taken else other for name, other in found])


def _write_table(table: pa.Table, path: AnyPath) -> None:
    with publish(path) as file:
        pq.write_table(table.replace_schema_metadata(None), file)
