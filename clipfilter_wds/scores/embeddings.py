"""Keeps the embeddings of a shard beside its score table: a plain ``.npy`` per tower, a row per sample as there."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.storage.paths import AnyPath, num_bytes_of
from clipfilter_wds.storage.publish import publish

_FOLDER = "_embeddings"


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardEmbeddings:
    """The embeddings of a shard's samples, in the order of its score table.

    Attributes:
        image: Of the images, float16 or float32 ``[num_samples, dim]``, L2-normalised; zeros where there is no score.
        text: Of the captions, likewise. Of an image with several captions, that of the one whose similarity counted;
            where that was their mean, the normalised mean of all.
    """

    image: np.ndarray
    text: np.ndarray

    @classmethod
    def from_rows(cls, embeddings: np.ndarray, rows: np.ndarray, num_samples: int) -> Self:
        """Put the embeddings of some samples at their rows, and zeros at the others.

        Args:
            embeddings: Of images and captions, ``[2, N, dim]``. What is not finite counts as none.
            rows: Row of each, int64 ``[N]``.
            num_samples: Rows in all.
        """
        finite = np.isfinite(embeddings).all(axis=(0, 2))
        placed = np.zeros((2, num_samples, embeddings.shape[2]), dtype=embeddings.dtype)
        placed[:, rows[finite]] = embeddings[:, finite]
        return cls(image=placed[0], text=placed[1])


@dataclass(frozen=True)
class EmbeddingFiles:
    """The files of a shard's embeddings, ``NAME.image.npy`` and ``NAME.text.npy``: float16 or float32, in C order.

    They go with the table whose metadata says so, which is written after them.

    Attributes:
        folder: Where they are.
        name: The shard's name in the folder.
    """

    folder: AnyPath
    name: str

    @classmethod
    def beside(cls, tables: AnyPath, name: str) -> Self:
        """Those of the table ``NAME.parquet`` in a folder of tables."""
        return cls((tables.parent if tables.name == "_scores" else tables) / _FOLDER, name)

    @property
    def image(self) -> AnyPath:
        """Those of the images."""
        return self.folder / f"{self.name}.image.npy"

    @property
    def text(self) -> AnyPath:
        """Those of the captions."""
        return self.folder / f"{self.name}.text.npy"

    def write(self, embeddings: ShardEmbeddings) -> None:
        """Write both; each appears whole. Write the table after them."""
        for path, array in ((self.image, embeddings.image), (self.text, embeddings.text)):
            with publish(path) as file:
                np.save(file, np.ascontiguousarray(array), allow_pickle=False)

    def remove(self) -> None:
        """Delete both."""
        for path in (self.image, self.text):
            path.unlink(missing_ok=True)

    def read(self, metadata: ScoreMetadata) -> ShardEmbeddings:
        """Open them: mapped into memory on this machine, read from remote storage.

        Args:
            metadata: What their score table says of itself.

        Raises:
            ValueError: When there are none, or they don't go with the table.
        """
        if metadata.embeddings is None:
            raise ValueError(
                f"the scores of {metadata.shard!r} were made without embeddings, or derived from others; "
                "`clipfilter-wds score --embeddings fp16` saves them"
            )
        return ShardEmbeddings(image=_open(self.image, metadata), text=_open(self.text, metadata))

    def are_there(self, metadata: ScoreMetadata) -> bool:
        """Whether both files are there and as large as the table has it."""
        if metadata.embeddings is None:
            return False
        shape, dtype = _expected(metadata)
        num_bytes = len(_header(shape, dtype)) + shape[0] * shape[1] * dtype.itemsize
        return all(num_bytes_of(path) == num_bytes for path in (self.image, self.text))


def _open(path: AnyPath, metadata: ScoreMetadata) -> np.ndarray:
    shape, dtype = _expected(metadata)
    try:
        if isinstance(path, Path) and shape[0]:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            array = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except PermissionError as error:
        raise ValueError(f"can't read the embeddings {str(path)!r}: {error.strerror}") from error
    except (OSError, EOFError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"can't read the embeddings {str(path)!r}: {why}; score the shard again") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"{str(path)!r} holds {array.dtype} {list(array.shape)}, and its score table goes with {dtype} "
            f"{list(shape)}; score the shard again"
        )
    embeddings: np.ndarray = array
    return embeddings


def _expected(metadata: ScoreMetadata) -> tuple[tuple[int, int], np.dtype]:
    assert metadata.embeddings is not None
    return (metadata.num_samples, metadata.embeddings["dim"]), np.dtype(metadata.embeddings["dtype"])


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What ``np.save`` writes before an array."""
    file = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()
