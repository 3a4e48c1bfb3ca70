"""Opens the score tables that a run derives from, matched by shard and sample, and their embeddings."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from clipfilter_wds.scores.embeddings import EmbeddingFiles, ShardEmbeddings
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.same_shard import check_same_samples, check_same_shard
from clipfilter_wds.scores.table import ShardScores, read_metadata


@dataclass(frozen=True, kw_only=True)
class SourceShard:
    """What is known of one shard.

    Attributes:
        number: Its place in the run, which is in order of name.
        name: What its tables are called, without suffix; independent of where the shard lies.
        tables: Its score table in each of the folders.
        metadata: What each of them says of itself.
        embeddings_of: The table that its embeddings go with, what it says of itself, and where they are; None where
            none are used.
    """

    number: int
    name: str
    tables: tuple[Path, ...]
    metadata: tuple[ScoreMetadata, ...]
    embeddings_of: tuple[Path, ScoreMetadata, EmbeddingFiles] | None

    @cached_property
    def scores(self) -> list[ShardScores]:
        """Per folder, its scores.

        Raises:
            ValueError: When a table is damaged, or they are not of the same samples.
        """
        found = [ShardScores.read(table) for table in self.tables]
        for table, scores in zip(self.tables[1:], found[1:], strict=True):
            check_same_samples(table, scores, self.tables[0], found[0])
        return found

    @cached_property
    def usable(self) -> np.ndarray:
        """Per sample, whether it has a score in every folder: bool ``[num_samples]``."""
        usable: np.ndarray = np.all([scores.usable for scores in self.scores], axis=0)
        return usable

    @property
    def usable_scores(self) -> list[np.ndarray]:
        """Per folder, the scores of the usable samples: float32 ``[N]``."""
        return [scores.scores[self.usable] for scores in self.scores]

    @cached_property
    def embeddings(self) -> ShardEmbeddings:
        """The embeddings of all its samples, mapped into memory.

        Raises:
            ValueError: When they are missing or damaged, or not of the same samples.
        """
        assert self.embeddings_of is not None
        table, metadata, files = self.embeddings_of
        if table not in self.tables:
            check_same_samples(table, ShardScores.read(table), self.tables[0], self.scores[0])
        return files.read(metadata)


@dataclass(frozen=True, kw_only=True)
class SavedEmbeddings:
    """What embeddings are.

    Attributes:
        dtype: ``float16`` or ``float32``.
        dim: How many numbers each has.
        temperature: The checkpoint's, None when it has none that fits.
    """

    dtype: str
    dim: int
    temperature: float | None


class Sources:
    """The score tables of one or several folders.

    Args:
        folders: Of tables of the same shards.
        embeddings: Folder whose tables the embeddings go with; None for the first of the folders.
        use_embeddings: Whether any are needed.

    Raises:
        ValueError: When the folders hold tables of different shards, embeddings are missing, or one of the folders is
            a trial on other samples than the first.
    """

    def __init__(
        self, folders: Sequence[str | Path], *, embeddings: str | Path | None = None, use_embeddings: bool = True
    ) -> None:
        self._folders = [ScoreFolder(folder) for folder in folders]
        self._embeddings = None
        if use_embeddings:
            self._embeddings = self._folders[0] if embeddings is None else ScoreFolder(embeddings)
        first = self._folders[0]
        #: The shards' names.
        self.names = [_name_of(path, first) for path in first.paths]
        for folder in [*self._folders[1:], *([] if self._embeddings is None else [self._embeddings])]:
            _check_names(self.names, folder, first)
        for folder in self._folders[1:]:
            _check_limit(folder, first)
        if self._embeddings is not None and "limit" in self._embeddings.fingerprint:
            _check_limit(self._embeddings, first)  # embeddings of all samples serve a trial

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fingerprints(self) -> list[Fingerprint]:
        """Per folder, what its scores depend on beside the shards."""
        return [folder.fingerprint for folder in self._folders]

    @property
    def failed(self) -> dict[str, str]:
        """Shards that could not be scored and so have no table, and why."""
        return {url: why for folder in self._folders for url, why in folder.failed.items()}

    @property
    def parents(self) -> list[Fingerprint]:
        """The same, and what the embeddings depend on, where any are used."""
        return [*self.fingerprints, *([] if self._embeddings is None else [self._embeddings.fingerprint])]

    @property
    def embeddings_of(self) -> Fingerprint:
        """What the embeddings depend on beside the shards."""
        assert self._embeddings is not None
        return self._embeddings.fingerprint

    @property
    def embeddings_folder(self) -> Path:
        """Where the tables are that the embeddings go with."""
        assert self._embeddings is not None
        return self._embeddings.folder

    @cached_property
    def saved(self) -> SavedEmbeddings:
        """What all shards' embeddings have in common.

        Raises:
            ValueError: When there are none, or they differ.
        """
        assert self._embeddings is not None
        found = None
        for path in self._embeddings.paths:
            metadata = read_metadata(path)
            if metadata.embeddings is None:
                raise ValueError(
                    f"{str(path)!r} was written without embeddings; `clipfilter-wds score --embeddings fp16` saves "
                    "them, and --embeddings names the folder where SCORES were derived from such tables"
                )
            saved = SavedEmbeddings(**metadata.embeddings)
            found = found or saved
            if saved != found:
                raise ValueError(
                    f"{str(path)!r} goes with embeddings of another type, {saved}, than the tables before it, {found}; "
                    "`clipfilter-wds score` with one type for --embeddings makes all alike"
                )
        assert found is not None
        return found

    @property
    def shards(self) -> Iterator[SourceShard]:
        """The shards in order of name, each opened when it is asked for."""
        for number in range(len(self)):
            yield self.shard(number)

    def shard(self, number: int) -> SourceShard:
        """One of the shards.

        Raises:
            ValueError: When its tables are of different shards.
        """
        name = self.names[number]
        tables = tuple(folder.folder / f"{name}.parquet" for folder in self._folders)
        metadata = tuple(read_metadata(table) for table in tables)
        embeddings_of = None
        for table, found in zip(tables[1:], metadata[1:], strict=True):
            check_same_shard(table, found, tables[0], metadata[0])
        if self._embeddings is not None:
            table = self._embeddings.folder / f"{name}.parquet"
            embeddings_of = table, read_metadata(table), self._embeddings.embedding_files(table)
            check_same_shard(table, embeddings_of[1], tables[0], metadata[0])
        return SourceShard(number=number, name=name, tables=tables, metadata=metadata, embeddings_of=embeddings_of)

    def digest(self) -> str:
        """A digest of all scores and reasons, for what depends on all of them."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(json.dumps([shard.name, len(shard.usable)]).encode())
            for scores in shard.scores:
                digest.update(scores.scores.tobytes())
                digest.update(scores.reasons.tobytes())
        return digest.hexdigest()


def _name_of(path: Path, folder: ScoreFolder) -> str:
    return path.relative_to(folder.folder).with_suffix("").as_posix()


def _check_names(names: Sequence[str], folder: ScoreFolder, first: ScoreFolder) -> None:
    found = {_name_of(path, folder) for path in folder.paths}
    if lacking := [name for name in names if name not in found]:
        raise ValueError(
            f"{str(folder.folder)!r} has no table of {lacking[0]!r}"
            f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}, and {str(first.folder)!r} has; "
            "make both of the same shards"
        )
    if more := sorted(found - set(names)):
        raise ValueError(
            f"{str(folder.folder)!r} has a table of {more[0]!r}, and {str(first.folder)!r} has none; make both of the "
            "same shards"
        )


def _check_limit(folder: ScoreFolder, first: ScoreFolder) -> None:
    """Refuse a trial beside all samples: what is made of both would be one, and might not say so."""
    if folder.fingerprint.get("limit") != first.fingerprint.get("limit"):
        raise ValueError(
            f"{str(folder.folder)!r} has scores of {_extent(folder)}, and {str(first.folder)!r} of {_extent(first)}; "
            "score both without --limit, or with the same"
        )


def _extent(folder: ScoreFolder) -> str:
    limit = folder.fingerprint.get("limit")
    return "all samples" if limit is None else f"the first {limit:,} samples alone (--limit)"
