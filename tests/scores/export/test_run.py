"""Exports, read as the tools that they are for read them."""

import importlib
import json
import subprocess
import sys

import fsspec
import numpy as np
import pandas as pd
import pytest

from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.export.config import ExportConfig
from clipfilter_wds.scores.export.run import export
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from tests.support.toys import pair, write_shard

NUM_SHARDS, PER_SHARD, UNREADABLE = 11, 5, 2


@pytest.fixture(scope="module")
def scores(scorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for shard in range(NUM_SHARDS):
        samples = [{**pair(10 * shard + i), "json": record(shard, i)} for i in range(PER_SHARD)]
        samples[UNREADABLE] = {"jpg": b"no image", "txt": b"a caption"}
        write_shard(folder / f"{shard:05d}.tar", samples if shard != 4 else [], start=1000 * shard)
    output = tmp_path_factory.mktemp("scores")
    saved = {"embeddings": "fp16", "columns": "json:caption=text,json:original_width=integer"}
    process_shards(ScoreConfig(shards=f"{folder}/*.tar", output=output, batch_size=64, num_workers=0, **saved), scorer)
    return output


def record(shard: int, number: int) -> bytes:
    """As img2dataset writes it: ``original_width`` is what the image had before it was resized."""
    number += 1000 * shard
    return json.dumps(
        {"uid": f"{number:032x}", "caption": f"caption {number}", "original_width": 2000 + number}
    ).encode()


def expected(scores) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """The rows that have a score, in order, and their embeddings."""
    folder, rows, images, texts = ScoreFolder(scores), [], [], []
    for path in folder.paths:
        table = ShardScores.read(path)
        embeddings = folder.embedding_files(path).read(table.metadata)
        rows += [row for row in table.table.to_pylist() if row["reason"] is None]
        images.append(embeddings.image[table.usable])
        texts.append(embeddings.text[table.usable])
    assert len(rows) == (NUM_SHARDS - 1) * (PER_SHARD - 1)
    return rows, np.concatenate(images), np.concatenate(texts)


@pytest.fixture
def clip_retrieval(scores, tmp_path):
    config = ExportConfig(scores=scores, output=tmp_path / "out", format="clip_retrieval")
    assert export(config) == ((NUM_SHARDS - 1) * (PER_SHARD - 1), NUM_SHARDS - 1)
    return tmp_path / "out"


def test_the_layout_is_clip_retrievals(scores, clip_retrieval):
    names = sorted(str(path.relative_to(clip_retrieval)) for path in clip_retrieval.rglob("*.*"))
    numbers = [f"{number:02d}" for number in range(NUM_SHARDS) if number != 4]
    assert names == [
        *(f"img_emb/img_emb_{number}.npy" for number in numbers),
        *(f"metadata/metadata_{number}.parquet" for number in numbers),
        *(f"text_emb/text_emb_{number}.npy" for number in numbers),
    ]
    rows, images, texts = expected(scores)
    for tower, vectors in (("img", images), ("text", texts)):
        files = sorted((clip_retrieval / f"{tower}_emb").iterdir())
        np.testing.assert_array_equal(np.concatenate([np.load(file) for file in files]), vectors)
    metadata = pd.concat([pd.read_parquet(file) for file in sorted((clip_retrieval / "metadata").iterdir())])
    assert metadata["image_path"].tolist() == [row["key"] for row in rows]
    assert metadata["score"].tolist() == [row["score"] for row in rows]
    assert metadata["uid"].tolist() == [row["uid"].hex() for row in rows]


@pytest.fixture
def embedding_reader(tmp_path, monkeypatch):
    """The package, without what it asks for: an older pandas, although it runs with this one."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "packages"]
    subprocess.run([*install, "embedding_reader==1.8.1"], check=True)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return importlib.import_module("embedding_reader")


@pytest.mark.slow  # installs a package
def test_clip_retrievals_reader_reads_it(embedding_reader, scores, clip_retrieval):
    reader = embedding_reader.EmbeddingReader(
        embeddings_folder=str(clip_retrieval / "img_emb"),
        metadata_folder=str(clip_retrieval / "metadata"),
        meta_columns=["image_path", "score"],
        file_format="parquet_npy",
    )
    rows, images, _ = expected(scores)
    assert (reader.count, reader.dimension) == images.shape
    found = list(reader(batch_size=7, start=0, end=reader.count, show_progress=False))
    np.testing.assert_array_equal(np.concatenate([vectors for vectors, _ in found]), images)
    metadata = pd.concat([rows for _, rows in found])
    assert metadata["image_path"].tolist() == [row["key"] for row in rows]


def test_datacomps_baselines_can_read_it(scores, tmp_path):
    """They list a folder's parquet files, and open ``NAME.npz`` beside ``NAME.parquet`` through fsspec."""
    export(ExportConfig(scores=scores, output=tmp_path / "out", format="datacomp", datacomp_model="b32"))
    rows, images, texts = expected(scores)
    uids, similarities, found = [], [], {"b32_img": [], "b32_txt": []}
    columns = ["uid", "text", "clip_b32_similarity_score", "original_width", "original_height"]
    filesystem, folder = fsspec.core.url_to_fs(str(tmp_path / "out"))
    for path in sorted(name for name in filesystem.ls(folder) if ".parquet" in name):
        metadata = pd.read_parquet(path, columns=columns, filesystem=filesystem)
        uids += [(int(uid[:16], 16), int(uid[16:32], 16)) for uid in metadata["uid"].values]
        similarities += metadata["clip_b32_similarity_score"].tolist()
        assert metadata["text"].tolist() == [f"caption {int(uid, 16)}" for uid in metadata["uid"]]
        assert metadata["original_width"].tolist() == [2000 + int(uid, 16) for uid in metadata["uid"]]
        assert (metadata["original_height"] > 0).all()
        arrays = np.load(filesystem.open(path.replace(".parquet", ".npz")))
        assert set(arrays) == set(found)
        assert {(array.dtype, len(array)) for array in arrays.values()} == {(np.dtype("float16"), len(metadata))}
        for name in found:
            found[name].append(arrays[name])
    assert uids == [divmod(int(row["uid"].hex(), 16), 2**64) for row in rows]
    assert similarities == [row["score"] for row in rows]
    np.testing.assert_array_equal(np.concatenate(found["b32_img"]), images)
    np.testing.assert_array_equal(np.concatenate(found["b32_txt"]), texts)


def test_the_command_says_what_it_wrote(command, scores, tmp_path):
    arguments = ("export", scores, "--format", "clip_retrieval", "--output", tmp_path / "out")
    code, said = command(*arguments)
    assert code == 0
    assert "40 samples of 10 shards" in " ".join(said.split())
    code, said = command(*arguments)
    assert code == 2
    assert "is not empty" in said


def test_another_score_of_that_name_is_refused(scorer, tmp_path):
    sample = {**pair(0), "json": json.dumps({"uid": "0" * 32, "clip_b32_similarity_score": 0.25}).encode()}
    write_shard(tmp_path / "0.tar", [sample])
    saved = {"embeddings": "fp16", "columns": "json:clip_b32_similarity_score"}
    config = ScoreConfig(shards=tmp_path / "0.tar", output=tmp_path / "scores", num_workers=0, **saved)
    process_shards(config, scorer)
    layout = {"scores": tmp_path / "scores", "format": "datacomp"}
    with pytest.raises(ValueError, match="the scores would be called that too; choose another --datacomp_model"):
        export(ExportConfig(output=tmp_path / "b32", datacomp_model="b32", **layout))
    assert export(ExportConfig(output=tmp_path / "l14", datacomp_model="l14", **layout)) == (1, 1)


def test_an_export_does_not_mix_with_the_tables(scores):
    with pytest.raises(ValueError, match="would mix with the tables in"):
        ExportConfig(scores=scores, output=scores / "exported", format="datacomp")


def test_what_can_not_be_exported_is_refused(scorer, scores, tmp_path):
    with pytest.raises(ValueError, match="format is 'csv'; use clip_retrieval or datacomp"):
        ExportConfig(scores=scores, output=tmp_path / "out", format="csv")
    with pytest.raises(ValueError, match="datacomp_model is for format 'datacomp', and format is 'clip_retrieval'"):
        ExportConfig(scores=scores, output=tmp_path / "out", format="clip_retrieval", datacomp_model="b32")
    with pytest.raises(ValueError, match="datacomp_model is 'h14'; use b32 or l14"):
        ExportConfig(scores=scores, output=tmp_path / "out", format="datacomp", datacomp_model="h14")
    write_shard(tmp_path / "0.tar", [pair(0)])
    for embeddings, layout, message in (
        (None, "datacomp", "made without embeddings, or derived from others; `clipfilter-wds score --embeddings"),
        ("fp16", "datacomp", "sample '000000000' has no uid in its json member"),
    ):
        plain = {"shards": tmp_path / "0.tar", "output": tmp_path / str(embeddings), "num_workers": 0}
        process_shards(ScoreConfig(embeddings=embeddings, **plain), scorer)
        with pytest.raises(ValueError, match=message):
            export(ExportConfig(scores=plain["output"], output=tmp_path / f"{embeddings}-out", format=layout))


@pytest.mark.parametrize("layout", ["clip_retrieval", "datacomp"])
def test_scores_of_no_sample_are_not_exported(scorer, tmp_path, layout):
    write_shard(tmp_path / "0.tar", [{"jpg": b"no image", "txt": b"a caption"}])
    config = ScoreConfig(shards=tmp_path / "0.tar", output=tmp_path / "scores", embeddings="fp16", num_workers=0)
    process_shards(config, scorer)
    with pytest.raises(ValueError, match=r"none of the samples in .* has a score and an embedding"):
        export(ExportConfig(scores=tmp_path / "scores", output=tmp_path / "out", format=layout))
