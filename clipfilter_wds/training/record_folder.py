"""Keeps the scores that loaders record in a folder: a table for each whole shard, and parts of the others."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np
import pyarrow as pa

from clipfilter_wds.console import printable
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.embeddings import EmbeddingFiles, ShardEmbeddings
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.folder import PARTS_FOLDER, read_all_metadata
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores, no_rows, read_metadata, read_scores
from clipfilter_wds.shards.names import output_names, public_url, unnameable
from clipfilter_wds.shards.open import shard_identity
from clipfilter_wds.storage.publish import publish, publish_json, remove_leftovers
from clipfilter_wds.types import ShardEnd, ShardIdentity

_log = logging.getLogger(__name__)


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
        embeddings: What the tables say of the embeddings that are saved beside them; None saves none. What is recorded
            without these does not count, and is recorded again.
    """

    folder: Path
    names: Mapping[str, str]
    fingerprint: Fingerprint
    threshold: float | None
    embeddings: Mapping[str, Any] | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        urls: Sequence[str],
        fingerprint: Fingerprint,
        threshold: float | None,
        embeddings: Mapping[str, Any] | None = None,
    ) -> Self:
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
        record = cls(folder=folder, names=names, fingerprint=fingerprint, threshold=threshold, embeddings=embeddings)
        record._remove_joined_parts()
        return record

    def _remove_joined_parts(self) -> None:
        """Delete the parts of whole shards, which a run that was killed has left."""
        has_parts = {path.name.partition(".")[0] for path in (self.folder / PARTS_FOLDER).glob("*")}
        for url in self.names if has_parts else ():
            if self._stem_of_parts(url) in has_parts and self._is_done(url):
                self._remove_parts(url)

    def table(self, url: str) -> Path:
        """Where the scores of a whole shard are, or will be."""
        return self.folder / f"{self.names[url]}.parquet"

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
                    scores = read_scores(path, url)
                    if self._has_embeddings(url, scores.metadata):
                        return [scores], True
                tables = []
                for path in self._files_of_parts(url, "*.parquet"):
                    tables.append(ShardScores.read(path))
                shard = shard_identity(url) if tables else ShardIdentity()
                return [part for part in tables if self._counts(part, shard)], False
            except ValueError:
                if path.exists():
                    raise
                # Another process has just made one table of the parts.

    def add_part(
        self,
        url: str,
        rows: SampleRows,
        scores: np.ndarray,
        *,
        identity: ShardIdentity,
        band: float = 0.0,
        embeddings: np.ndarray | None = None,
    ) -> None:
        """Record some samples of a shard.

        Args:
            url: The shard.
            rows: The samples.
            scores: Those of the usable ones.
            identity: What the storage tells of the shard.
            band: How close to the threshold scores are in float32.
            embeddings: Of the images and captions of the usable ones, ``[2, N, dim]``, where they are saved.
        """
        if not len(rows) or self._is_done(url):
            return
        metadata = ScoreMetadata(
            shard=public_url(url),
            **identity._asdict(),
            num_samples=len(rows),
            torn=False,
            fingerprint=self.fingerprint,
            band=band,
            rechecked_at=self.threshold,
            embeddings=self.embeddings,
        )
        part = ShardScores.from_rows(rows, scores, metadata)
        path = self._part(url, f"{uuid4().hex}.parquet")
        if embeddings is not None:
            # As the table is: by index, and none where there is no score.
            row_of = np.argsort(np.argsort(rows.numbers["index"], kind="stable"))[rows.usable]
            has_score = part.usable[row_of]
            placed = ShardEmbeddings.from_rows(embeddings[:, has_score], row_of[has_score], len(rows))
            _embeddings_of_part(path).write(placed)
        _write(path, part)

    def add_end(self, url: str, end: ShardEnd) -> None:
        """Record what is at a shard's end."""
        if not self._is_done(url):
            publish_json(self._part(url, "json"), asdict(end))
            self._join_parts(url)

    def _is_done(self, url: str) -> bool:
        """Whether nothing of a shard is recorded any more."""
        if url not in self.names:
            return True
        path = self.table(url)
        return path.exists() and self._has_embeddings(url, read_metadata(path))

    def _has_embeddings(self, url: str, metadata: ScoreMetadata) -> bool:
        """Whether a whole shard's embeddings are there, if they are to be."""
        if self.embeddings is None:
            return True
        return metadata.embeddings == self.embeddings and self._embeddings(url).are_there(metadata)

    def _embeddings(self, url: str) -> EmbeddingFiles:
        return EmbeddingFiles.beside(self.folder, self.names[url])

    def _stem_of_parts(self, url: str) -> str:
        # A name of its own: with more at its end, a shard's may be too long.
        return sha256(self.names[url].encode()).hexdigest()

    def _part(self, url: str, ending: str) -> Path:
        return self.folder / PARTS_FOLDER / f"{self._stem_of_parts(url)}.{ending}"

    def _files_of_parts(self, url: str, ending: str) -> list[Path]:
        return sorted((self.folder / PARTS_FOLDER).glob(self._part(url, ending).name))

    def _counts(self, part: ShardScores, shard: ShardIdentity) -> bool:
        """Whether a part is of this shard, and not of another one that had its name, and has what is to be saved."""
        if self.embeddings is not None and part.metadata.embeddings != self.embeddings:
            return False
        return bool(shard.matches(part.metadata.identity))

    def _join_parts(self, url: str) -> None:
        """Make one table of a shard's parts, if they hold all its samples."""
        try:
            end = ShardEnd(**json.loads(self._part(url, "json").read_bytes()))
            found = [(path, ShardScores.read(path)) for path in self._files_of_parts(url, "*.parquet")]
            parts = [(path, part) for path, part in found if self._counts(part, end.identity)]
            rows = pa.concat_tables([no_rows(), *(part.table for _, part in parts)])
            # By index: a sample may have been scored twice, by two runs at once.
            indices, places = np.unique(rows["index"].to_numpy(), return_index=True)
            if not np.array_equal(indices, np.arange(end.num_samples)):
                return
            if self.embeddings is not None:
                self._embeddings(url).write(self._joined_embeddings(parts, places))
        except (FileNotFoundError, ValueError):
            return  # another process has done it
        said = [part.metadata for _, part in parts]
        metadata = ScoreMetadata(
            shard=public_url(url),
            **end.identity._asdict(),
            num_samples=end.num_samples,
            torn=end.torn,
            fingerprint=self.fingerprint,
            band=max((part.band for part in said), default=0.0),
            rechecked_at=self.threshold if all(part.rechecked_at == self.threshold for part in said) else None,
            embeddings=self.embeddings,
        )
        _write(self.table(url), ShardScores(table=rows.take(places).combine_chunks(), metadata=metadata))
        self._remove_parts(url)

    def _remove_parts(self, url: str) -> None:
        for path in self._files_of_parts(url, "*"):
            path.unlink(missing_ok=True)

    def _joined_embeddings(self, parts: Sequence[tuple[Path, ShardScores]], places: np.ndarray) -> ShardEmbeddings:
        """The embeddings of these rows of all the parts together."""
        assert self.embeddings is not None
        nothing = np.empty((0, self.embeddings["dim"]), dtype=self.embeddings["dtype"])
        found = [_embeddings_of_part(path).read(part.metadata) for path, part in parts]
        images = np.concatenate([nothing, *(each.image for each in found)])[places]
        texts = np.concatenate([nothing, *(each.text for each in found)])[places]
        return ShardEmbeddings(image=images, text=texts)


def _write(path: Path, scores: ShardScores) -> None:
    with publish(path) as file:
        scores.write(file)


def _embeddings_of_part(path: Path) -> EmbeddingFiles:
    """Those that go with a part's table, which is written after them."""
    return EmbeddingFiles(path.parent, path.stem)
