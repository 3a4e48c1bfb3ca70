"""Finds the score table of a shard in a folder of them."""

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa

from clipfilter_wds.scores.embeddings import EmbeddingFiles
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.kind import COSINES, ScoreKind
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores, read_metadata, read_schema, read_scores
from clipfilter_wds.scores.table_folder import table_folder
from clipfilter_wds.shards.names import public_url, shard_path, unnameable
from clipfilter_wds.types import ShardError

#: Folder within a folder of tables in which a loader records scores of shards that it has not read whole.
PARTS_FOLDER = "_parts"


class ScoreFolder:
    """The score tables of a folder, one per shard, looked up by shard; each is read when it is asked for.

    A shard's table is the one that was made from its URL; where the shards have moved, the one whose name in the folder
    (``00000``, ``a/00000``) is the longest that the shard's path ends with. Either way the shard must be the one
    that was scored.

    Args:
        folder: What ``clipfilter-wds score`` or ``rewrite`` wrote: a folder of tables, or one that holds ``_scores``.

    Raises:
        ValueError: When the folder is not on this machine, or holds no table, a file that is none, or tables of
            different fingerprints.
    """

    def __init__(self, folder: str | Path) -> None:
        #: Where the tables lie.
        self.folder = table_folder(folder)
        self._name_by_source: dict[str, str] = {}
        self._names_by_stem: dict[str, list[str]] = defaultdict(list)
        fingerprint, kind = None, COSINES
        #: The tables, sorted.
        self.paths: list[Path] = []
        for path, metadata in read_all_metadata(self.folder):
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            if name.startswith(f"{PARTS_FOLDER}/"):
                continue
            if fingerprint is None:
                fingerprint, kind = metadata.fingerprint, metadata.kind
            check_fingerprint(
                metadata.fingerprint, fingerprint, f"{str(path)!r} does not go with the tables before it: it"
            )
            self.paths.append(path)
            self._add(name, metadata.shard)
        if fingerprint is None:
            raise ValueError(_why_empty(Path(folder).expanduser()))
        #: What all the scores depend on beside the shards.
        self.fingerprint: Fingerprint = fingerprint
        #: What they are.
        self.kind = kind
        #: Shards that the run that wrote the tables could not use, and why.
        self.failed = _failed_shards(self.folder)

    def _add(self, name: str, source: str) -> None:
        self._names_by_stem[PurePosixPath(name).name].append(name)
        if not source.startswith("pipe:"):  # what is public of a command does not tell which shard it reads
            self._name_by_source.setdefault(source, name)

    def refuse_trial(self) -> None:
        """Refuse scores of a run's first samples.

        Raises:
            ValueError: When the tables are of ``--limit``.
        """
        if limit := self.fingerprint.get("limit"):
            raise ValueError(
                f"the scores in {str(self.folder)!r} are a trial on the first {limit:,} samples; score without --limit"
            )

    def read(self, url: str) -> ShardScores:
        """The scores of a shard.

        Raises:
            ShardError: When there are none, or the shard is not the one that was scored.
            ValueError: When the table is damaged.
        """
        path = self.path(url)
        if path is None:
            raise ShardError(f"there is no score table of it in {str(self.folder)!r}; score it first")
        return read_scores(path, url)

    def path(self, url: str) -> Path | None:
        """A shard's table."""
        name = self._find(url)
        return None if name is None else self.folder / f"{name}.parquet"

    def embedding_files(self, path: Path) -> EmbeddingFiles:
        """The embeddings that go with one of the tables."""
        return EmbeddingFiles.beside(self.folder, path.relative_to(self.folder).with_suffix("").as_posix())

    def lacking(self, urls: Iterable[str]) -> list[str]:
        """The shards that have no table."""
        return [url for url in urls if self._find(url) is None]

    def _find(self, url: str) -> str | None:
        """The name of a shard's table."""
        if (name := self._name_by_source.get(public_url(url))) is not None:
            return name
        if unnameable([url]):
            return None  # it could not have got one
        path = PurePosixPath(shard_path(url)).parts
        names = [name for name in self._names_by_stem.get(path[-1], ()) if _is_end(PurePosixPath(name).parts, path)]
        return max(names, key=lambda name: name.count("/"), default=None)


def kind_of_scores(folder: str | Path) -> ScoreKind:
    """What the scores in a folder are, by any of its tables; cosines where there is none yet.

    Raises:
        ValueError: When a parquet file is no score table.
    """
    path = next(table_folder(folder).rglob("*.parquet"), None)
    return COSINES if path is None else read_metadata(path).kind


def fingerprint_of_scores(folder: str | Path) -> Fingerprint | None:
    """What the scores in a folder depend on beside the shards, by any of its tables; None where there is none yet.

    Raises:
        ValueError: When a parquet file is no score table.
    """
    path = next(table_folder(folder).rglob("*.parquet"), None)
    return None if path is None else read_metadata(path).fingerprint


def schema_of_scores(folder: str | Path) -> pa.Schema | None:
    """The columns of the tables in a folder, by any of them; None where there is none yet."""
    path = next(table_folder(folder).rglob("*.parquet"), None)
    return None if path is None else read_schema(path)


def _why_empty(folder: Path) -> str:
    if folder.is_file():
        return f"{str(folder)!r} is a file; name the folder of score tables that it lies in"
    if next(folder.rglob("*_stats.json"), None) is not None and (folder / "summary.json").is_file():
        return (
            f"there is no score table in {str(folder)!r}: its rewrite chose by scores that were made before. Name the "
            f"folder of those; for a report of both: `clipfilter-wds report SCORES --run {shlex.quote(str(folder))}`"
        )
    found = f"there is no score table in {str(folder)!r}" if folder.is_dir() else f"there is no folder {str(folder)!r}"
    return f"{found}; `clipfilter-wds score SHARDS --output DIR` writes score tables to DIR"


def read_all_metadata(folder: Path) -> Iterator[tuple[Path, ScoreMetadata]]:
    """Every table in a folder and below, in order of name, with what it says of itself.

    Raises:
        ValueError: When a parquet file is no score table.
    """
    for path in sorted(folder.rglob("*.parquet")):
        yield path, read_metadata(path)


def _is_end(end: tuple[str, ...], path: tuple[str, ...]) -> bool:
    return path[len(path) - len(end) :] == end


def _failed_shards(folder: Path) -> dict[str, str]:
    path = (folder.parent if folder.name == "_scores" else folder) / "summary.json"
    if not path.is_file():
        return {}
    try:
        failed: dict[str, str] = json.loads(path.read_bytes())["failed_shards"]
        return {**failed}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{str(path)!r} is not the summary of the run that wrote the tables beside it; put it elsewhere, or make "
            "the tables again"
        ) from None
