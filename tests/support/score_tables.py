"""Makes score tables of made-up samples."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import SampleRow

FINGERPRINT = {
    "model": "m",
    "weights": "0" * 64,
    "resize": 32,
    "crop": [32, 32],
    "mean": [0.5, 0.25],
    "nested": {"a": 1},
}


def shard_scores(rows: list[SampleRow], scores=None, **changes) -> ShardScores:
    """The scores of a shard with these rows; by default, usable ones score from -1 to 1."""
    if scores is None:
        scores = np.linspace(-1, 1, sum(row.reason is None for row in rows), dtype=np.float32)
    says = {"shard": "/data/0.tar", "num_bytes": 10_240, "torn": False, "fingerprint": FINGERPRINT, **changes}
    metadata = ScoreMetadata(num_samples=len(rows), **says)
    return ShardScores.from_rows(SampleRows.of(rows), np.asarray(scores, dtype=np.float32), metadata)


def derive(folder: Path, kind: str, of, *, limits=(None, None)) -> Path:
    """Turn the score tables in a folder into ones of another kind: ``of`` cosines, float32 ``[N]``."""
    for path in folder.rglob("*.parquet"):
        found = ShardScores.read(path)
        derived = np.where(found.usable, of(found.scores), 0).astype(np.float32)
        column = found.table.schema.get_field_index("score")
        table = found.table.set_column(column, "score", pa.array(derived))
        fingerprint = {**found.metadata.fingerprint, "score": kind}
        metadata = replace(found.metadata, fingerprint=fingerprint, range=limits, band=0.0)
        path.write_bytes(written(ShardScores(table=table, metadata=metadata)))
    return folder


def written(scores: ShardScores) -> bytes:
    """The bytes of a table's file."""
    file = io.BytesIO()
    scores.write(file)
    return file.getvalue()


def plain_parquet(**metadata) -> bytes:
    """A Parquet file with one column and this metadata; keys and values become bytes."""
    file = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), file)
    return file.getvalue()
