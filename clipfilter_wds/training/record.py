"""Records the scores that loaders make in a folder, for later epochs and runs."""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Self
from uuid import uuid4

import numpy as np
import pyarrow as pa

from clipfilter_wds.console import printable
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.folder import PARTS_FOLDER, read_all_metadata
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores, no_rows, read_scores
from clipfilter_wds.shards.names import output_names, public_url, unnameable
from clipfilter_wds.shards.open import shard_identity
from clipfilter_wds.storage.publish import publish, publish_json, remove_leftovers
from clipfilter_wds.training.batches import StreamBatch
from clipfilter_wds.training.precomputed import PrecomputedScore, PrecomputedScores, precomputed_scores
from clipfilter_wds.training.stream import PartEnd
from clipfilter_wds.types import ShardEnd, ShardError, ShardIdentity

_log = logging.getLogger(__name__)

#: Rows of a shard that are held back until they are written; what a killed run loses of each shard it was reading.
_MAX_HELD_ROWS = 4096

_NO_SCORES = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordFolder:
    """A folder of score tables that grows: one per shard that was scored whole, and parts of the others in ``_parts``.

    Any number of ranks and runs may write to it at once. Files appear whole, and the process that writes a shard's last
    part makes one table of them all.

    Attributes:
        folder: Where.
        names: Per shard, its name in the folder. A shard that can have none is not recorded.
        fingerprint: What the scores depend on beside the shards.
        threshold: What scores are compared with; those within the error band around it are in float32.
    """

    folder: Path
    names: Mapping[str, str]
    fingerprint: Fingerprint
    threshold: float | None

    @classmethod
    def open(cls, folder: str | Path, urls: Sequence[str], fingerprint: Fingerprint, threshold: float | None) -> Self:
        """Make the folder, or add to it. A warning names the shards that can't be recorded.

        Raises:
            ValueError: When it can't be written, or holds scores of another fingerprint.
        """
        if "://" in str(folder):
            raise ValueError(f"record {str(folder)!r} is no local folder; remote ones can't be recorded to")
        folder = Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        except OSError as error:
            raise ValueError(f"can't write to record {str(folder)!r}: {error.strerror}") from error
        for path, metadata in read_all_metadata(folder):
            check_fingerprint(metadata.fingerprint, fingerprint, f"the record {str(path)!r}")
        nameless = unnameable(urls)
        for why in nameless.values():
            _log.warning("scores of a shard are not recorded: %s", printable(why))
        names = output_names([url for url in urls if url not in nameless])
        return cls(folder=folder, names=names, fingerprint=fingerprint, threshold=threshold)

    def table(self, url: str) -> Path:
        """Where the scores of a whole shard are, or will be."""
        return self.folder / f"{self.names[url]}.parquet"

    def _parts(self, url: str) -> list[Path]:
        return sorted((self.folder / PARTS_FOLDER).glob(self._part(url, "*.parquet").name))

    def _part(self, url: str, ending: str) -> Path:
        # A name of its own: with more at its end, a shard's may be too long.
        name = sha256(self.names[url].encode()).hexdigest()
        return self.folder / PARTS_FOLDER / f"{name}.{ending}"

    def read(self, url: str) -> tuple[list[ShardScores], bool]:
        """The tables that hold what is recorded of a shard, and whether that is the whole shard.

        Parts have no signature. Those of another storage version are left out, so their samples are scored again.

        Raises:
            ShardError: When the shard is not the one that was scored whole.
            ValueError: When a table is damaged.
        """
        if url not in self.names:
            return [], False
        while True:
            path = self.table(url)
            try:
                if path.exists():
                    return [read_scores(path, url)], True
                tables = []
                for path in self._parts(url):
                    tables.append(ShardScores.read(path))
                return _those_of(tables, shard_identity(url)) if tables else [], False
            except ValueError:
                if path.exists():
                    raise
                # Another process has just made one table of the parts.

    def add_part(
        self, url: str, rows: SampleRows, scores: np.ndarray, *, identity: ShardIdentity, band: float = 0.0
    ) -> None:
        """Record some samples of a shard.

        Args:
            url: The shard.
            rows: The samples.
            scores: Those of the usable ones.
            identity: What the storage tells of the shard.
            band: How close to the threshold scores are in float32.
        """
        if len(rows) and not self._is_done(url):
            metadata = ScoreMetadata(
                shard=public_url(url),
                **identity._asdict(),
                num_samples=len(rows),
                torn=False,
                fingerprint=self.fingerprint,
                band=band,
                rechecked_at=self.threshold,
            )
            part = ShardScores.from_rows(rows, scores, metadata)
            self._write(self._part(url, f"{uuid4().hex}.parquet"), part)

    def add_end(self, url: str, end: ShardEnd) -> None:
        """Record what is at a shard's end."""
        if not self._is_done(url):
            publish_json(self._part(url, "json"), asdict(end))
            self._join_parts(url)

    def _is_done(self, url: str) -> bool:
        """Whether nothing of a shard is recorded any more."""
        return url not in self.names or self.table(url).exists()

    def _join_parts(self, url: str) -> None:
        """Make one table of a shard's parts, if they hold all its samples."""
        paths, end_path = self._parts(url), self._part(url, "json")
        try:
            end = ShardEnd(**json.loads(end_path.read_bytes()))
            parts = _those_of([ShardScores.read(path) for path in paths], end.identity)
            said = [part.metadata for part in parts]
        except (FileNotFoundError, ValueError):
            return  # another process has done it
        rows = pa.concat_tables([no_rows(), *(part.table for part in parts)])
        # By index: a sample may have been scored twice, by two runs at once.
        indices, places = np.unique(rows["index"].to_numpy(), return_index=True)
        if not np.array_equal(indices, np.arange(end.num_samples)):
            return
        metadata = ScoreMetadata(
            shard=public_url(url),
            **end.identity._asdict(),
            num_samples=end.num_samples,
            torn=end.torn,
            fingerprint=self.fingerprint,
            band=max((part.band for part in said), default=0.0),
            rechecked_at=self.threshold if all(part.rechecked_at == self.threshold for part in said) else None,
        )
        self._write(self.table(url), ShardScores(table=rows.take(places).combine_chunks(), metadata=metadata))
        for path in (*paths, end_path):
            path.unlink(missing_ok=True)

    @staticmethod
    def _write(path: Path, scores: ShardScores) -> None:
        with publish(path) as file:
            scores.write(file)


def _those_of(parts: Sequence[ShardScores], shard: ShardIdentity) -> list[ShardScores]:
    """The parts that were scored of this shard, and not of another one that had its name."""
    return [part for part in parts if shard.matches(part.metadata.identity)]


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
    """Rows of a shard that are not written yet, and the scores of the usable ones."""

    identity: ShardIdentity = field(default_factory=ShardIdentity)
    band: float = 0.0
    num_rows: int = 0
    rows: list[SampleRows] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)

    def add(self, rows: SampleRows, scores: np.ndarray) -> None:
        self.num_rows += len(rows)
        self.rows.append(rows)
        self.scores.append(scores)


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

    def add(self, batch: StreamBatch, scores: np.ndarray, band: float) -> None:
        """Record what was scored of a batch.

        Args:
            batch: The batch.
            scores: Raw cosines of its usable samples that had no score, float32 ``[N]``.
            band: How close to the threshold these are in float32.
        """
        rows, url_of = batch.prepared.rows, batch.url_of[~batch.is_known]
        with self._lock:
            for number in np.unique(url_of).tolist():
                url, of_shard = batch.urls[number], url_of == number
                held = self._held[url]
                held.identity, held.band = batch.identities[url], max(held.band, band)
                held.add(rows.take(np.flatnonzero(of_shard)), scores[of_shard[rows.usable]])
            full = [url for url, held in self._held.items() if held.num_rows >= _MAX_HELD_ROWS]
            self._write(full, batch.ends)

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
                    self._record.add_part(url, rows, scores, identity=held.identity, band=held.band)
            for part in ends:
                if not self._failed:
                    self._record.add_end(part.url, part.end)
        except OSError as error:
            self._failed = True
            _log.warning("scores are no longer recorded: %s", error)
