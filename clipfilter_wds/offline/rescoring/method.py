"""Defines what a method does: new scores, or reasons to have none, for one shard after another."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from clipfilter_wds.offline.rescoring.sources import Sources, SourceShard
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.kind import ScoreKind
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.types import NO_REASON, REASON_CODES, DropReason


class Preparing(NamedTuple):
    """How far a method is before it scores the first shard.

    Attributes:
        phase: What it does, such as ``reading``.
        done: How much of it is done.
        total: How much there is to do.
        unit: Of what.
    """

    phase: str
    done: int
    total: int
    unit: str


#: Called now and then.
OnPreparing = Callable[[Preparing], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rescored:
    """The new scores of a shard.

    Attributes:
        scores: Of the samples without a reason: float32 ``[N]``.
        reasons: Per sample: int8 ``[num_samples]`` of ``REASON_CODES``, or ``NO_REASON``.
    """

    scores: np.ndarray
    reasons: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Method:
    """Makes scores of what is known of a shard.

    Attributes:
        score: Does it. The result depends on nothing but the shard and the settings, so shards may come in any order.
        settings: What else it depends on: part of the tables' fingerprint. JSON-ready.
        kind: What the scores are; None where they are those of the last folder.
    """

    score: Callable[[SourceShard], Rescored]
    settings: Mapping[str, Any]
    kind: ScoreKind | None = None

    @property
    def base(self) -> int:
        """The folder whose tables get the new scores."""
        return -1 if self.kind is None else 0

    def fingerprint(self, sources: Sources) -> Fingerprint:
        """What the new scores depend on beside the shards."""
        parents = [{name: value for name, value in parent.items() if name != "model"} for parent in sources.parents]
        derived = {**self.settings, "of": list(map(digest_of, parents))}
        if self.kind is None:
            return {**sources.fingerprints[self.base], "derived": derived}
        return {**sources.fingerprints[self.base], "score": self.kind.name, "derived": derived}

    def metadata(self, shard: SourceShard, fingerprint: Fingerprint) -> ScoreMetadata:
        """What the new table of a shard says of itself."""
        if self.kind is None:
            return replace(shard.metadata[self.base], fingerprint=fingerprint, embeddings=None)
        return replace(
            shard.metadata[self.base],
            fingerprint=fingerprint,
            range=(self.kind.low, self.kind.high),
            embeddings=None,
            band=0.0,  # it is one of cosines
            rechecked=0,
            rechecked_at=None,
        )


def reasons_of(shard: SourceShard) -> np.ndarray:
    """Per sample, the reason that the first folder with one has: int8 ``[num_samples]``."""
    reasons = shard.scores[0].reasons
    for scores in shard.scores[1:]:
        reasons = np.where(reasons == NO_REASON, scores.reasons, reasons)
    return reasons


def drop(shard: SourceShard, dropped: np.ndarray, reason: DropReason) -> Rescored:
    """The last folder's scores, less the usable samples that are dropped, bool ``[N]``, for a reason."""
    reasons = reasons_of(shard)
    reasons[np.flatnonzero(shard.usable)[dropped]] = REASON_CODES[reason]
    return Rescored(scores=shard.usable_scores[-1][~dropped], reasons=reasons)


def digest_of(content: Mapping[str, Any]) -> str:
    """A digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
