"""Holds what a score table says of itself."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.kind import COSINE, COSINES, ScoreKind
from clipfilter_wds.types import ShardIdentity

Embeddings = Literal["fp16", "fp32"]

#: Types of saved embeddings, as numpy and torch call them.
DTYPES: dict[Embeddings, str] = {"fp16": "float16", "fp32": "float32"}

_METADATA_KEY = b"clipfilter_wds"
_FORMAT_VERSION = 1

#: Entries of the metadata that the first tables lack.
_CAME_LATER: dict[str, Any] = {
    "members": {},
    "range": (COSINES.low, COSINES.high),
    "batch_size": None,
    "embeddings": None,
    "columns": (),
    "storage_version": None,
    "signature": None,
}


class VersionError(Exception):
    """A table of another version."""


@dataclass(frozen=True, kw_only=True)
class ScoreMetadata:
    """What a score table says of itself, under these names.

    Attributes:
        version: Of the format.
        shard: The shard's URL, without credentials.
        num_bytes: The shard's size as stored, -1 when unknown.
        storage_version: Its ETag or time of change when it was scored; see ``ShardIdentity``.
        signature: A hash of its tar headers; likewise.
        num_samples: Rows of the table.
        torn: Whether the shard is damaged or cut.
        fingerprint: What the scores depend on beside the shard.
        band: The largest difference from float32 scores that was allowed for, 0.0 when the scores are in float32.
        rechecked: How many samples have their caption in float32, and their image where that does not decide, since
            their scores lay within the band of the run's threshold.
        rechecked_at: That threshold, at which all scores decide as float32 does; None for scores that were made for
            none, or in float32.
        members: What the shard's members are called, and how many are; see ``shards/found.py``.
        batch_size: How many samples were scored together, which the last bits of scores in low precision depend on;
            None when that is not known, or not the same for all.
        range: The lowest and the highest score that there can be; None for no such limit.
        embeddings: What was saved beside the table: ``dtype`` (``float16``, ``float32``), ``dim``, and the model's
            ``temperature``, which is 1 / exp(logit_scale), or None where the checkpoint has none. None when none were.
        columns: Where the further columns of the table come from, and their types: ``json:punsafe=number``.
    """

    version: int = _FORMAT_VERSION
    shard: str
    num_bytes: int
    num_samples: int
    torn: bool
    fingerprint: Fingerprint
    band: float = 0.0
    rechecked: int = 0
    rechecked_at: float | None = None
    members: Mapping[str, int] = field(default_factory=dict)
    batch_size: int | None = None
    range: tuple[float | None, float | None] = (COSINES.low, COSINES.high)
    embeddings: Mapping[str, Any] | None = None
    columns: tuple[str, ...] = ()
    storage_version: str | None = None
    signature: str | None = None

    @property
    def kind(self) -> ScoreKind:
        """What the scores are, by the fingerprint's entry ``score``; cosines where there is none."""
        return ScoreKind(self.fingerprint.get("score", COSINE), *self.range)

    @property
    def identity(self) -> ShardIdentity:
        """What tells the shard from another one."""
        return ShardIdentity(self.num_bytes, self.storage_version, self.signature)

    def to_schema(self) -> dict[bytes, str]:
        """As a parquet schema holds it."""
        return {_METADATA_KEY: json.dumps(asdict(self))}

    @classmethod
    def from_schema(cls, metadata: Mapping[bytes, bytes] | None) -> Self:
        """From :meth:`to_schema`.

        Raises:
            VersionError: When it is of another version.
            KeyError, TypeError, ValueError: When it is none.
        """
        found = json.loads((metadata or {})[_METADATA_KEY])
        if found["version"] != _FORMAT_VERSION:
            raise VersionError(f"has format {found['version']}, this version reads {_FORMAT_VERSION}")
        found = {**_CAME_LATER, **found}
        found["range"], found["columns"] = tuple(found["range"]), tuple(found["columns"])
        return cls(**{field.name: found[field.name] for field in fields(cls)})
