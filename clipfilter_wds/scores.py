"""Score tables: one parquet file per shard, with the fingerprint of what made the scores."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter_wds.dataset import SampleRow
from clipfilter_wds.types import DropReason

_METADATA_KEY = b"clipfilter_wds"
_FORMAT_VERSION = 1
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("index", pa.int32()),
        ("score", pa.float32()),
        ("reason", pa.string()),
        ("num_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)

Fingerprint = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardScores:
    """The scores of one shard, a row per sample in the order of the shard.

    Attributes:
        table: Columns ``key``, ``index``, ``score`` (raw cosine; 0.0 where there is a reason), ``reason`` (a
            :class:`~clipfilter_wds.types.DropReason` or null), ``num_tokens``, ``truncated``, ``width``, ``height``.
        source: The shard's URL, without credentials.
        num_bytes: The shard's size as stored, -1 when unknown.
        torn: Whether the shard is damaged or cut.
        fingerprint: What the scores depend on beside the shard.
    """

    table: pa.Table
    source: str
    num_bytes: int
    torn: bool
    fingerprint: Fingerprint

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[SampleRow],
        scores: np.ndarray,
        *,
        source: str,
        num_bytes: int,
        torn: bool,
        fingerprint: Fingerprint,
    ) -> Self:
        """Put rows, in any order, and the scores of those without a reason, in the same order, together."""
        all_scores = np.zeros(len(rows), dtype=np.float32)
        usable = np.array([row.reason is None for row in rows], dtype=bool)
        if len(scores) != usable.sum():
            raise ValueError(f"{usable.sum()} samples could be scored, and there are {len(scores)} scores")
        all_scores[usable] = scores
        table = pa.table(
            [all_scores if name == "score" else [getattr(row, name) for row in rows] for name in _SCHEMA.names],
            schema=_SCHEMA,
        )
        table = table.sort_by("index").combine_chunks()
        return cls(table=table, source=source, num_bytes=num_bytes, torn=torn, fingerprint=fingerprint)

    def write(self, file: BinaryIO) -> None:
        """Write as parquet."""
        metadata = {
            "version": _FORMAT_VERSION,
            "shard": self.source,
            "num_bytes": self.num_bytes,
            "num_samples": self.table.num_rows,
            "torn": self.torn,
            "fingerprint": dict(self.fingerprint),
        }
        pq.write_table(self.table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)}), file)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            ValueError: When the file is no score table of this version.
        """
        try:
            table = pq.read_table(path)
            metadata = json.loads((table.schema.metadata or {})[_METADATA_KEY])
            version = metadata["version"]
            if version == _FORMAT_VERSION:
                return cls(
                    table=table,
                    source=metadata["shard"],
                    num_bytes=metadata["num_bytes"],
                    torn=metadata["torn"],
                    fingerprint=metadata["fingerprint"],
                )
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is not a score table of clipfilter-wds: {error}") from error
        raise ValueError(f"{str(path)!r} has format {version}, this version reads {_FORMAT_VERSION}")

    @property
    def scores(self) -> np.ndarray:
        """Raw cosines, float32 ``[num_samples]``."""
        scores: np.ndarray = self.table["score"].to_numpy()
        return scores

    @property
    def keys(self) -> list[str]:
        """Per sample, its key."""
        keys: list[str] = self.table["key"].to_pylist()
        return keys

    @property
    def usable(self) -> np.ndarray:
        """Per sample, whether it could be scored: bool ``[num_samples]``."""
        usable: np.ndarray = self.table["reason"].is_null().to_numpy()
        return usable

    @property
    def num_truncated(self) -> int:
        """How many captions were longer than the text tower takes."""
        return int(self.table["truncated"].to_numpy().sum())

    @property
    def dropped(self) -> dict[DropReason, int]:
        """Per reason, how many samples could not be scored."""
        counts = Counter(self.table["reason"].drop_null().to_pylist())
        return {reason: counts[reason] for reason in DropReason if counts[reason]}


def check_fingerprint(found: Fingerprint, expected: Fingerprint, where: str) -> None:
    """Refuse scores that were made in another way. The model's name may differ as long as its weights don't.

    Raises:
        ValueError: Naming the differing entries with both values.
    """
    names = [name for name in {**expected, **found} if name != "model" and found.get(name) != expected.get(name)]
    if "weights" in names and found.get("model") != expected.get("model"):
        names = ["model", *names]
    if names:
        differences = "; ".join(
            f"{name} {_short(found.get(name))} there, {_short(expected.get(name))} here" for name in names
        )
        raise ValueError(f"{where} was made with other settings ({differences})")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] + "…" if len(text) == 64 else text
