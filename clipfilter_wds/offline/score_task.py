"""Makes a shard's score table, and the tar of the kept samples right after it. A task is all that a process needs."""

from dataclasses import dataclass, replace
from typing import Self

from clipfilter_wds.offline.commit import CURE, check_source
from clipfilter_wds.offline.copying import CopyTask, shard_stats
from clipfilter_wds.offline.kept import Saved
from clipfilter_wds.offline.pending import ScoredShard
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.scores.embeddings import EmbeddingFiles
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.metadata import Embeddings, ScoreMetadata
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores, read_metadata
from clipfilter_wds.shards.identity import is_scored
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.storage.publish import publish
from clipfilter_wds.types import ShardError


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """Makes the score table of a shard, and right after it the tar of the kept samples, where a task for that is given.

    Attributes:
        url: The shard.
        table: Where its scores go.
        fingerprint: What they depend on beside the shard.
        rechecked_at: What the table says of the threshold; see ``ScoreMetadata``.
        files: Where embeddings go.
        embeddings: Their type; None saves none.
        columns: What further columns the table has at least; see ``ScoreMetadata``.
        copy: Makes the tar; None where nothing is copied, or nothing before all shards are scored.
    """

    url: str
    table: AnyPath
    fingerprint: Fingerprint
    rechecked_at: float | None
    files: EmbeddingFiles
    embeddings: Embeddings | None
    columns: tuple[str, ...]
    copy: CopyTask | None

    @property
    def mark(self) -> AnyPath:
        """See ``Task``. A table is its own mark when nothing is copied."""
        return self.table if self.copy is None else self.copy.mark

    @property
    def tar(self) -> AnyPath | None:
        """See ``Task``."""
        return None if self.copy is None else self.copy.tar

    @property
    def embedding_paths(self) -> tuple[AnyPath, ...]:
        """The files of the embeddings that are saved."""
        return () if self.embeddings is None else (self.files.image, self.files.text)

    def committed(self) -> ShardStats | None:
        """See ``Task``."""
        if self.copy is None:
            scores = self._read_table()
            return None if scores is None else _stats_of(scores)
        stats = self.copy.committed()
        saves_nothing = not (self.embeddings or self.columns)
        return stats if stats is None or saves_nothing or self._read_table() is not None else None

    def is_done(self) -> bool:
        """Whether an earlier run has committed it; changes nothing.

        Raises:
            ValueError, ShardError: As :meth:`committed`.
        """
        if self.copy is None:
            return self._read_table() is not None
        return self.copy.is_done() and (not (self.embeddings or self.columns) or self._read_table() is not None)

    @property
    def saved(self) -> Saved:
        """What is saved beside the scores."""
        return Saved(self.embeddings, self.columns)

    def keeping_saved(self) -> Self:
        """The task that also saves what goes with the table that it replaces.

        Raises:
            ValueError: When one table can't hold both.
        """
        try:
            found = read_metadata(self.table) if self.table.is_file() else None
        except ValueError:
            return self  # it is damaged, and says nothing
        if found is None:
            return self
        try:
            embeddings, columns = Saved.found_in(found).with_(self.saved)
        except ValueError as error:
            raise ValueError(f"{str(self.table)!r} {error}; {CURE}") from None
        return replace(self, embeddings=embeddings, columns=columns)

    def copy_left(self) -> CopyTask | None:
        """The task that makes the tar, if a run that was killed has left the table that it takes.

        A table that is damaged or of another run counts as none: the shard is scored again, and the table replaced.
        """
        try:
            return None if self.copy is None or self._read_table() is None else self.copy
        except (ValueError, ShardError):
            return None

    def _read_table(self) -> ShardScores | None:
        """The table that an earlier run has left; None when there is none, or this run would make another one.

        Raises:
            ValueError: When it was made with another model, other settings or from another shard.
            ShardError: When the shard can't be reached.
        """
        if not self.table.is_file():
            return None
        scores = ShardScores.read(self.table)
        found = scores.metadata
        check_fingerprint(found.fingerprint, self.fingerprint, repr(str(self.table)), CURE)
        check_source(self.table, found.shard, self.url)
        is_alike = found.rechecked_at == self.rechecked_at and is_scored(self.url, found.identity, self.table)
        is_whole = not Saved.found_in(found).lacks(self.saved) and (
            self.embeddings is None or self.files.are_there(found)
        )
        return scores if is_alike and is_whole else None

    def commit(self, shard: ScoredShard) -> ShardStats:
        """Write the embeddings, the table, then the tar; when this returns, they are on disk and whole.

        Raises:
            ShardError: When the shard can't be read again or has changed.
            ValueError: When a run of other settings has made the output meanwhile.
        """
        if (stats := self.committed()) is not None:
            return stats  # a run that does the same work at once was faster, and may have ended: what it says stays
        if self.copy is not None and (self.embeddings or self.columns):
            self.copy.files.forget()  # it may be of a table without these
        self._clear(shard.scores.metadata)
        if shard.embeddings is not None:
            self.files.write(shard.embeddings)
        with publish(self.table) as file:
            shard.scores.write(file)
        return _stats_of(shard.scores) if self.copy is None else self.copy()

    def _clear(self, metadata: ScoreMetadata) -> None:
        """Delete a table that goes with other embeddings, and then these; not what another run has made of the same.

        A table stays where it can until it is replaced: it alone tells a run that resumes this one what it had.

        Raises:
            ValueError: When the table is the output, and a run of other settings has made it meanwhile.
        """
        try:
            found = read_metadata(self.table) if self.table.is_file() else metadata
        except ValueError:
            found = None
        if found is not None and self.copy is None:
            check_fingerprint(found.fingerprint, self.fingerprint, repr(str(self.table)), CURE)
        if found is None or (found.embeddings and _without_columns(found) != _without_columns(metadata)):
            self.table.unlink(missing_ok=True)
            self.files.remove()


def _without_columns(metadata: ScoreMetadata) -> ScoreMetadata:
    """What embeddings are of, which neither columns nor the threshold change."""
    return replace(metadata, columns=(), rechecked=0, rechecked_at=None)


def _stats_of(scores: ShardScores) -> ShardStats:
    return shard_stats(select(scores, threshold=None).stats, scores)
