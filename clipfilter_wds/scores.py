"""Score tables: one parquet file per shard, with the fingerprint of what made the scores."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter_wds.dataset import SampleRow
from clipfilter_wds.paths import AnyPath
from clipfilter_wds.shards import public_url, shard_num_bytes, shard_path
from clipfilter_wds.types import DropReason, ShardError

_METADATA_KEY = b"clipfilter_wds"
_FORMAT_VERSION = 1

#: Folder within a folder of tables in which a loader records scores of shards that it has not read whole.
PARTS_FOLDER = "_parts"
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
        ("uid", pa.binary(16)),
    ]
)

#: What stands for a reason in an array, and for none.
REASON_CODES = {reason: code for code, reason in enumerate(DropReason)}
NO_REASON = -1

Fingerprint = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardScores:
    """The scores of one shard, a row per sample in the order of the shard.

    Attributes:
        table: Columns ``key``, ``index``, ``score`` (raw cosine; 0.0 where there is a reason), ``reason`` (a
            :class:`~clipfilter_wds.types.DropReason` or null), ``num_tokens``, ``truncated``, ``width``, ``height``,
            ``uid`` (16 bytes, big-endian; null where the sample's json member tells none).
        source: The shard's URL, without credentials.
        num_bytes: The shard's size as stored, -1 when unknown.
        torn: Whether the shard is damaged or cut.
        fingerprint: What the scores depend on beside the shard.
        band: The largest difference from float32 scores that was allowed for, 0.0 when the scores are in float32.
        num_rechecked: How many samples have their caption in float32, and their image where that does not decide, since
            their scores lay within the band of the run's threshold.
        rechecked_at: That threshold, where one is known at which all scores decide as float32 does.
    """

    table: pa.Table
    source: str
    num_bytes: int
    torn: bool
    fingerprint: Fingerprint
    band: float = 0.0
    num_rechecked: int = 0
    rechecked_at: float | None = None

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
        band: float = 0.0,
        num_rechecked: int = 0,
        rechecked_at: float | None = None,
    ) -> Self:
        """Put rows, in any order, and the scores of those without a reason, in the same order, together.

        A score that is NaN or infinite is none: its sample has the reason ``not_finite``.
        """
        all_scores = np.zeros(len(rows), dtype=np.float32)
        usable = np.array([row.reason is None for row in rows], dtype=bool)
        if len(scores) != usable.sum():
            raise ValueError(f"{usable.sum()} samples could be scored, and there are {len(scores)} scores")
        all_scores[usable] = scores
        finite = np.isfinite(all_scores)
        reasons = [row.reason if ok else DropReason.NOT_FINITE for row, ok in zip(rows, finite, strict=True)]
        computed = {"score": np.where(finite, all_scores, 0.0), "reason": reasons}
        table = pa.table(
            [computed[name] if name in computed else [getattr(row, name) for row in rows] for name in _SCHEMA.names],
            schema=_SCHEMA,
        )
        table = table.sort_by("index").combine_chunks()
        return cls(
            table=table,
            source=source,
            num_bytes=num_bytes,
            torn=torn,
            fingerprint=fingerprint,
            band=band,
            num_rechecked=num_rechecked,
            rechecked_at=rechecked_at,
        )

    def write(self, file: BinaryIO) -> None:
        """Write as parquet."""
        metadata = {
            "version": _FORMAT_VERSION,
            "shard": self.source,
            "num_bytes": self.num_bytes,
            "num_samples": self.table.num_rows,
            "torn": self.torn,
            "fingerprint": dict(self.fingerprint),
            "band": self.band,
            "rechecked": self.num_rechecked,
            "rechecked_at": self.rechecked_at,
        }
        pq.write_table(self.table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)}), file)

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            ValueError: When the file is no score table of this version.
        """
        with _naming(path):
            table = pq.read_table(pa.BufferReader(path.read_bytes()))
            metadata = _check_version(table.schema.metadata)
            if table.num_rows != metadata["num_samples"]:
                raise ValueError(f"it holds {table.num_rows} of {metadata['num_samples']} samples")
            return cls(
                table=table,
                source=metadata["shard"],
                num_bytes=metadata["num_bytes"],
                torn=metadata["torn"],
                fingerprint=metadata["fingerprint"],
                band=metadata["band"],
                num_rechecked=metadata["rechecked"],
                rechecked_at=metadata["rechecked_at"],
            )

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
    def uids(self) -> list[bytes | None]:
        """Per sample, its uid."""
        uids: list[bytes | None] = self.table["uid"].to_pylist()
        return uids

    @property
    def reasons(self) -> np.ndarray:
        """Per sample, why it could not be scored: int8 ``[num_samples]`` of :data:`REASON_CODES`, or NO_REASON."""
        codes = pc.index_in(self.table["reason"], pa.array(list(DropReason), pa.string()))
        reasons: np.ndarray = codes.fill_null(NO_REASON).to_numpy().astype(np.int8)
        return reasons

    @property
    def num_truncated(self) -> int:
        """How many captions were longer than the text tower takes."""
        return int(self.table["truncated"].to_numpy().sum())

    @property
    def dropped(self) -> dict[DropReason, int]:
        """Per reason, how many samples could not be scored."""
        counts = Counter(self.table["reason"].drop_null().to_pylist())
        return {reason: counts[reason] for reason in DropReason if counts[reason]}


class ScoreTable:
    """The score tables of a folder, one per shard, looked up by shard; each is read when it is asked for.

    A shard's table is the one that was made from its URL; where the shards have moved, the one whose name in the folder
    (``00000``, ``a/00000``) is the longest that the shard's path ends with. Either way the shard must have the size
    that was recorded.

    Args:
        folder: What ``clipfilter-wds score`` or ``rewrite`` wrote: a folder of tables, or one that holds ``_scores``.

    Raises:
        ValueError: When the folder holds no table, a file that is none, or tables of different fingerprints.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser()
        #: Where the tables lie.
        self.folder = folder / "_scores" if (folder / "_scores").is_dir() else folder
        self._name_by_source: dict[str, str] = {}
        self._names_by_stem: dict[str, list[str]] = defaultdict(list)
        fingerprint: Fingerprint | None = None
        #: The tables, sorted.
        self.paths: list[Path] = []
        for path, metadata in read_all_metadata(self.folder):
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            if name.startswith(f"{PARTS_FOLDER}/"):
                continue
            fingerprint = fingerprint or metadata["fingerprint"]
            in_the_way = f"{str(path)!r} does not go with the tables before it: it"
            check_fingerprint(metadata["fingerprint"], fingerprint, in_the_way)
            self.paths.append(path)
            self._add(name, metadata["shard"])
        if fingerprint is None:
            raise ValueError(
                f"there is no score table in {str(folder)!r}; write some: `clipfilter-wds score SHARDS --output DIR`"
            )
        #: What all the scores depend on beside the shards.
        self.fingerprint = fingerprint
        #: Shards that the run that wrote the tables could not use, and why.
        self.failed = _failed_shards(self.folder)

    def _add(self, name: str, source: str) -> None:
        self._names_by_stem[PurePosixPath(name).name].append(name)
        if not source.startswith("pipe:"):  # what is public of a command does not tell which shard it reads
            self._name_by_source.setdefault(source, name)

    def read(self, url: str) -> ShardScores:
        """The scores of a shard.

        Raises:
            ShardError: When there are none, or the shard has another size than the one that was scored.
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

    def lacking(self, urls: Iterable[str]) -> list[str]:
        """The shards that have no table."""
        return [url for url in urls if self._find(url) is None]

    def _find(self, url: str) -> str | None:
        """The name of a shard's table."""
        if (name := self._name_by_source.get(public_url(url))) is not None:
            return name
        path = PurePosixPath(shard_path(url)).parts
        names = [name for name in self._names_by_stem.get(path[-1], ()) if _is_end(PurePosixPath(name).parts, path)]
        return max(names, key=lambda name: name.count("/"), default=None)


def no_rows() -> pa.Table:
    """The table of a shard without samples."""
    return _SCHEMA.empty_table()


def read_all_metadata(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every table in a folder and below, in order of name, with what it says of itself (``shard``, ``fingerprint``).

    Raises:
        ValueError: When a parquet file is no score table.
    """
    for path in sorted(folder.rglob("*.parquet")):
        with _naming(path):
            metadata = _check_version(pq.read_metadata(path).metadata)
            checked = {"shard": metadata["shard"], "fingerprint": metadata["fingerprint"]}
        yield path, checked


def read_scores(path: AnyPath, url: str) -> ShardScores:
    """The scores of a shard, from its table.

    Raises:
        ShardError: When the shard has another size than the one that was scored.
        ValueError: When the table is damaged.
    """
    scores = ShardScores.read(path)
    _check_num_bytes(scores.num_bytes, path, url)
    return scores


def check_table(path: AnyPath, url: str) -> None:
    """See that a shard has the size of the one whose scores a table holds, without reading the scores.

    Raises:
        ShardError: When it has not.
        ValueError: When the file is no table.
    """
    with _naming(path):
        source = path if isinstance(path, Path) else pa.BufferReader(path.read_bytes())
        metadata = _check_version(pq.read_metadata(source).metadata)
    _check_num_bytes(metadata["num_bytes"], path, url)


def _check_num_bytes(scored: int, path: AnyPath, url: str) -> None:
    found = -1 if scored == -1 else shard_num_bytes(url)
    if found not in (-1, scored):
        raise ShardError(f"it is not the shard that was scored: {found} bytes here, {scored} in {str(path)!r}")


def _is_end(end: tuple[str, ...], path: tuple[str, ...]) -> bool:
    return path[len(path) - len(end) :] == end


def _failed_shards(folder: Path) -> dict[str, str]:
    summary = (folder.parent if folder.name == "_scores" else folder) / "summary.json"
    failed: dict[str, str] = json.loads(summary.read_bytes())["failed_shards"] if summary.is_file() else {}
    return failed


@contextmanager
def _naming(path: AnyPath) -> Iterator[None]:
    """Say which file is no score table, in whatever way reading it fails."""
    try:
        yield
    except _VersionError as error:
        raise ValueError(f"{str(path)!r} {error}") from None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a score table of clipfilter-wds: {error}") from error


class _VersionError(Exception):
    """A table of another version."""


def _check_version(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What a table's metadata says, if this version can read it."""
    found: dict[str, Any] = json.loads((metadata or {})[_METADATA_KEY])
    if found["version"] != _FORMAT_VERSION:
        raise _VersionError(f"has format {found['version']}, this version reads {_FORMAT_VERSION}")
    return found


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
