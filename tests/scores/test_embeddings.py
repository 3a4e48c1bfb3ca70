import errno
import os

import numpy as np
import pytest

from clipfilter_wds.scores.embeddings import EmbeddingFiles, ShardEmbeddings
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.storage.paths import any_path
from clipfilter_wds.types import SampleRow
from tests.support.score_tables import shard_scores, written

DIM = 8


def made(num_samples: int, dtype=np.float16) -> ShardEmbeddings:
    vectors = np.random.default_rng(0).normal(size=(2, num_samples, DIM)).astype(dtype)
    return ShardEmbeddings.from_rows(vectors, np.arange(num_samples), num_samples)


def metadata(num_samples: int, dtype: str = "float16", dim: int = DIM):
    rows = [SampleRow(str(index), index) for index in range(num_samples)]
    return shard_scores(rows, embeddings={"dtype": dtype, "dim": dim, "temperature": 0.01}).metadata


@pytest.mark.parametrize("num_samples", [0, 1, 7])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("folder", ["{}", "memory://embeddings"])
def test_what_was_written_is_opened(tmp_path, num_samples, dtype, folder):
    files = EmbeddingFiles(any_path(folder.format(tmp_path)) / f"{num_samples}{dtype.__name__}", "a/00000")
    embeddings, says = made(num_samples, dtype), metadata(num_samples, dtype.__name__)
    assert not files.are_there(says)
    files.write(embeddings)
    assert files.are_there(says)
    found = files.read(says)
    for tower in ("image", "text"):
        assert getattr(found, tower).dtype == dtype
        np.testing.assert_array_equal(getattr(found, tower), getattr(embeddings, tower))


def test_the_files_are_plain_npy_that_numpy_maps(tmp_path):
    files = EmbeddingFiles(tmp_path, "00000")
    files.write(made(5))
    for path in (tmp_path / "00000.image.npy", tmp_path / "00000.text.npy"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        assert array.shape == (5, DIM)
        assert array.flags.c_contiguous
    assert isinstance(files.read(metadata(5)).image, np.memmap)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (metadata(6), r"float16 \[5, 8\], and its score table goes with float16 \[6, 8\]"),
        (metadata(5, dim=9), r"float16 \[5, 8\], and its score table goes with float16 \[5, 9\]"),
        (metadata(5, "float32"), r"float16 \[5, 8\], and its score table goes with float32 \[5, 8\]"),
    ],
)
def test_embeddings_that_do_not_go_with_the_table_are_refused(tmp_path, says, message):
    files = EmbeddingFiles(tmp_path, "00000")
    files.write(made(5))
    assert not files.are_there(says)
    with pytest.raises(ValueError, match=message):
        files.read(says)


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_damaged_or_missing_embeddings_are_named(tmp_path, content):
    files = EmbeddingFiles(tmp_path, "00000")
    if content is not None:
        (tmp_path / "00000.image.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"can't read the embeddings '.*00000.image.npy'.*score the shard again"):
        files.read(metadata(5))


def test_embeddings_that_may_not_be_read_need_not_be_made_again(tmp_path, monkeypatch):
    files = EmbeddingFiles(tmp_path, "00000")
    files.write(made(5))

    def refuse(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(np, "load", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(ValueError, match=r"can't read the embeddings '.*00000\.image\.npy': Permission denied$"):
        files.read(metadata(5))


def test_a_table_without_embeddings_says_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"were made without embeddings, or derived .*score --embeddings"):
        EmbeddingFiles(tmp_path, "00000").read(shard_scores([SampleRow("0", 0)]).metadata)


def test_rows_without_an_embedding_and_those_that_are_not_finite_are_zero():
    vectors = np.ones((2, 3, DIM), dtype=np.float16)
    vectors[1, 1, 3] = np.nan
    found = ShardEmbeddings.from_rows(vectors, np.array([4, 0, 2]), 5)
    for array in (found.image, found.text):
        assert array.any(axis=1).tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("tables", ["", "_scores"])
def test_a_folder_finds_them_beside_its_tables(tmp_path, tables):
    (tmp_path / tables / "a").mkdir(parents=True)
    (tmp_path / tables / "a/00000.parquet").write_bytes(written(shard_scores([SampleRow("0", 0)])))
    folder = ScoreFolder(tmp_path)
    assert folder.embedding_files(folder.paths[0]).image == tmp_path / "_embeddings/a/00000.image.npy"
