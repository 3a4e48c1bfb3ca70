"""Makes unit embeddings, and folders of score tables that have some."""

from pathlib import Path

import numpy as np

from clipfilter_wds.scores.embeddings import EmbeddingFiles, ShardEmbeddings
from clipfilter_wds.types import DropReason, SampleRow
from tests.support.score_tables import shard_scores, written


def unit_rows(rng: np.random.Generator, num_rows: int, dim: int, *, dtype=np.float32, centres=None) -> np.ndarray:
    """Random unit vectors, ``[num_rows, dim]``; near to one of the centres each, if there are any."""
    rows = rng.standard_normal((num_rows, dim))
    if centres is not None:
        rows = 0.6 * rows + dim**0.5 * centres[rng.integers(0, len(centres), num_rows)]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


def pair_embeddings(rng: np.random.Generator, num_rows: int, dim: int, *, dtype=np.float32) -> ShardEmbeddings:
    """Images, and captions that are near to them."""
    images = unit_rows(rng, num_rows, dim)
    texts = images + 0.8 * unit_rows(rng, num_rows, dim)
    return ShardEmbeddings(
        image=images.astype(dtype), text=(texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(dtype)
    )


def write_scored(
    folder: Path,
    embeddings: dict[str, ShardEmbeddings],
    *,
    scores: dict[str, np.ndarray] | None = None,
    bad_every: int = 7,
    temperature: float | None = 0.05,
    **changes,
) -> Path:
    """Write score tables and embeddings, a shard for each name, as ``score --embeddings`` does.

    Every so many samples have no score, and no embeddings; scores are cosines where none are given.
    """
    for name, each in embeddings.items():
        bad = np.arange(len(each.image)) % bad_every == bad_every - 1 if bad_every else np.zeros(len(each.image), bool)
        image, text = (np.where(bad[:, None], array.dtype.type(0), array) for array in (each.image, each.text))
        reasons = [DropReason.UNREADABLE_IMAGE if is_bad else None for is_bad in bad]
        rows = [SampleRow(f"{name}-{index}", index, reason) for index, reason in enumerate(reasons)]
        own = (image.astype(np.float32) * text.astype(np.float32)).sum(1) if scores is None else scores[name]
        saved = {"dtype": image.dtype.name, "dim": image.shape[1], "temperature": temperature}
        table = shard_scores(rows, own[~bad], shard=f"/data/{name}.tar", embeddings=saved, **changes)
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        EmbeddingFiles.beside(folder, name).write(ShardEmbeddings(image=image, text=text))
        path.write_bytes(written(table))
    return folder
