"""Records the scores that loaders make, for later epochs and runs, and looks them up again."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Self

import numpy as np

from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.training.batches import StreamBatch
from clipfilter_wds.training.precomputed import PrecomputedScore, PrecomputedScores, precomputed_scores
from clipfilter_wds.training.record_folder import RecordFolder
from clipfilter_wds.training.stream import PartEnd
from clipfilter_wds.types import ShardError, ShardIdentity

_log = logging.getLogger(__name__)

#: Rows of a shard that are held back until they are written; what a killed run loses of each shard it was reading.
_MAX_HELD_ROWS = 4096

_NO_SCORES = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordLookup:
    """Looks up recorded scores, in the workers.

    A low-precision score that was recorded for another threshold and lies too close to this one counts as unknown.

    Attributes:
        record: Where.
    """

    record: RecordFolder

    def __call__(self, url: str) -> PrecomputedScores:
        """See :data:`ScoreLookup`.

        Raises:
            ValueError: When a table is damaged, or of another shard.
        """
        try:
            tables, is_whole = self.record.read(url)
        except ShardError as error:
            raise ValueError(f"{public_url(url)}: {error}; delete that file, and it is scored again") from error
        samples: dict[int, PrecomputedScore] = {}
        for scores in tables:
            known = precomputed_scores(scores, self.record.threshold).samples
            decided = scores.table["index"].to_numpy()[_decided(scores, self.record.threshold)]
            samples |= {index: known[index] for index in decided.tolist()}
        return PrecomputedScores(samples=samples, num_samples=tables[0].table.num_rows if is_whole else None)


def _decided(scores: ShardScores, threshold: float | None) -> np.ndarray:
    """Per sample, whether its score is exact enough to be compared with a threshold: bool ``[num_samples]``."""
    band, rechecked_at = scores.metadata.band, scores.metadata.rechecked_at
    if threshold is None or threshold <= 0.0 or band == 0.0 or threshold == rechecked_at:
        return np.ones(scores.table.num_rows, dtype=bool)
    is_near = np.abs(scores.scores.astype(np.float64) - threshold) <= band
    decided: np.ndarray = ~(is_near & scores.usable)
    return decided


@dataclass
class _Held:
    """Rows of a shard that are not written yet, and of the usable ones the scores and any embeddings."""

    identity: ShardIdentity = field(default_factory=ShardIdentity)
    band: float = 0.0
    num_rows: int = 0
    rows: list[SampleRows] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    embeddings: list[np.ndarray] = field(default_factory=list)

    def add(self, rows: SampleRows, scores: np.ndarray, embeddings: np.ndarray | None) -> None:
        self.num_rows += len(rows)
        self.rows.append(rows)
        self.scores.append(scores)
        if embeddings is not None:
            self.embeddings.append(embeddings)


class Recorder:
    """Records the scores of a loader's batches as they are made.

    Writing is no reason to stop training: when it fails, a warning says so and nothing more is recorded.

    Args:
        record: Where.
    """

    def __init__(self, record: RecordFolder) -> None:
        self._record = record
        self._held: defaultdict[str, _Held] = defaultdict(_Held)
        self._lock = Lock()
        self._failed = False

    def add(self, batch: StreamBatch, scores: np.ndarray, band: float, embeddings: np.ndarray | None = None) -> None:
        """Record what was scored of a batch.

        Args:
            batch: The batch.
            scores: Raw cosines of its usable samples that had no score, float32 ``[N]``.
            band: How close to the threshold these are in float32.
            embeddings: Of the same samples' images and captions, ``[2, N, dim]``, where they are saved.
        """
        rows, url_of = batch.prepared.rows, batch.url_of[~batch.is_known]
        with self._lock:
            for number in np.unique(url_of).tolist():
                url, of_shard = batch.urls[number], url_of == number
                held = self._held[url]
                held.identity, held.band = batch.identities[url], max(held.band, band)
                is_usable = of_shard[rows.usable]
                of_usable = None if embeddings is None else embeddings[:, is_usable]
                held.add(rows.take(np.flatnonzero(of_shard)), scores[is_usable], of_usable)
            full = [url for url, held in self._held.items() if held.num_rows >= _MAX_HELD_ROWS]
            self._write(full, batch.ends)

    def __reduce__(self) -> tuple[type[Self], tuple[RecordFolder]]:
        """A copy holds nothing back; the first one writes what it does."""
        return type(self), (self._record,)

    def flush(self) -> None:
        """Write all that is held back."""
        with self._lock:
            self._write(list(self._held))

    def _write(self, urls: Sequence[str], ends: Sequence[PartEnd] = ()) -> None:
        try:
            for url in (*urls, *(part.url for part in ends)):
                held = self._held.pop(url, _Held())
                if not self._failed:
                    rows, scores = SampleRows.concat(held.rows), np.concatenate([_NO_SCORES, *held.scores])
                    embeddings = np.concatenate(held.embeddings, axis=1) if held.embeddings else None
                    self._record.add_part(
                        url, rows, scores, identity=held.identity, band=held.band, embeddings=embeddings
                    )
            for part in ends:
                if not self._failed:
                    self._record.add_end(part.url, part.end)
        except OSError as error:
            self._failed = True
            _log.warning("scores are no longer recorded: %s", error)
