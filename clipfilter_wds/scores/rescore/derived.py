"""Makes the score table of other scores of the same samples."""

import numpy as np
import pyarrow as pa

from clipfilter_wds.scores.finite import finite_scores
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores, reason_texts


def derive(source: ShardScores, scores: np.ndarray, reasons: np.ndarray, metadata: ScoreMetadata) -> ShardScores:
    """The table with other scores and reasons; its other columns stay as they are.

    Args:
        source: The table.
        scores: Of the samples without a reason, in the same order: raw, float32 ``[N]``. One that is NaN or infinite is
            none: its sample gets the reason ``not_finite``.
        reasons: Per sample, why it has no score: int8 ``[num_samples]`` of ``REASON_CODES``, or ``NO_REASON``.
        metadata: What the new table says of itself.

    Raises:
        ValueError: When there are more or fewer scores than samples without a reason.
    """
    all_scores, all_reasons = finite_scores(reasons, scores)
    table = source.table
    for name, column in (("score", pa.array(all_scores)), ("reason", reason_texts(all_reasons))):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    return ShardScores(table=table, metadata=metadata)


def has_columns_of(derived: ShardScores, source: ShardScores) -> bool:
    """Whether a table's columns but for scores and reasons are still those of the one that it was made of."""
    one, other = (table.table.drop_columns(["score", "reason"]) for table in (derived, source))
    return one.schema.equals(other.schema) and all(map(_equal, one.columns, other.columns))


def _equal(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    if pa.types.is_floating(one.type):  # to pyarrow, NaN is not NaN
        return np.array_equal(one.to_numpy(), other.to_numpy(), equal_nan=True)
    return bool(one.equals(other))
