"""Embeddings that are saved beside the scores."""

import json
from pathlib import Path

import numpy as np
import pytest

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.preprocess.members import decode_members
from clipfilter_wds.scores.embeddings import ShardEmbeddings
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from tests.support.outputs import bits
from tests.support.toys import encoded, make_clip, pair, photo, write_shard

NUM_SHARDS, PER_SHARD, UNREADABLE = 3, 21, 7
OPTIONS = {"batch_size": 8, "num_workers": 0}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """Wide enough for a band as real models have it."""
    folder = make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)
    return ClipScorer(folder, device="cpu", precision="bf16")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("in")
    for shard in range(NUM_SHARDS):
        samples = [pair(100 * shard + i) for i in range(PER_SHARD)]
        samples[UNREADABLE] = {"jpg": b"no image", "txt": b"a caption"}
        write_shard(folder / f"{shard:05d}.tar", samples, start=1000 * shard)
    write_shard(folder / "empty.tar", [])
    write_shard(folder / "unusable.tar", [{"jpg": b"no image", "txt": b"a caption"}] * 3)
    return f"{folder}/*.tar"


def opened(output: Path) -> dict[str, tuple[ShardScores, ShardEmbeddings]]:
    """Every shard's scores and embeddings."""
    folder = ScoreFolder(output)
    scores = {path: ShardScores.read(path) for path in folder.paths}
    return {path.stem: (table, folder.embedding_files(path).read(table.metadata)) for path, table in scores.items()}


def products(embeddings: ShardEmbeddings) -> np.ndarray:
    return (embeddings.image.astype(np.float64) * embeddings.text.astype(np.float64)).sum(axis=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_in_float32_the_score_is_their_product(scorer, shards, tmp_path, dtype, tolerance):
    process_shards(ScoreConfig(shards=shards, output=tmp_path, embeddings=dtype, **OPTIONS), scorer)
    found = opened(tmp_path)
    assert found.keys() == {"00000", "00001", "00002", "empty", "unusable"}
    for table, embeddings in found.values():
        saved = table.metadata.embeddings
        assert saved == {"dtype": f"float{dtype[2:]}", "dim": 32, "temperature": scorer.temperature}
        np.testing.assert_allclose(products(embeddings), table.scores, atol=tolerance)
        for array in (embeddings.image, embeddings.text):
            lengths = np.linalg.norm(array.astype(np.float64), axis=1)
            np.testing.assert_allclose(lengths[table.usable], 1.0, atol=tolerance)
            assert not lengths[~table.usable].any()
    assert not found["00000"][0].usable[UNREADABLE]
    assert not found["00000"][1].image[UNREADABLE].any()


def test_in_low_precision_they_are_those_of_the_fast_pass(bf16, shards, tmp_path):
    plain = {"shards": shards, **OPTIONS}
    process_shards(ScoreConfig(output=tmp_path / "fast", embeddings="fp32", **plain), bf16)
    tables = opened(tmp_path / "fast")
    threshold = float(np.median(tables["00001"][0].scores))
    config = RewriteConfig(output=tmp_path / "rechecked", embeddings="fp32", threshold=threshold, **plain)
    assert process_shards(config, bf16).stats.rechecked > 0
    for name, (table, embeddings) in opened(tmp_path / "rechecked").items():
        fast_table, fast = tables[name]
        assert embeddings.image.tobytes() == fast.image.tobytes()
        assert embeddings.text.tobytes() == fast.text.tobytes()
        np.testing.assert_allclose(products(embeddings), fast_table.scores, atol=1e-6)
        assert (table.scores != fast_table.scores).any() == (table.metadata.rechecked > 0)


def test_they_are_the_same_bits_whatever_the_workers_and_in_score_and_rewrite(bf16, shards, tmp_path):
    plain = {"shards": shards, "embeddings": "fp16", "batch_size": 8}
    process_shards(ScoreConfig(output=tmp_path / "score", num_workers=0, **plain), bf16)
    process_shards(RewriteConfig(output=tmp_path / "rewrite", num_workers=2, threshold=0, **plain), bf16)
    process_shards(RewriteConfig(output=tmp_path / "packed", num_workers=3, samples_per_shard=9, **plain), bf16)
    expected = bits(tmp_path / "score/_embeddings")
    assert len(expected) == 2 * (NUM_SHARDS + 2)
    assert bits(tmp_path / "rewrite/_embeddings") == bits(tmp_path / "packed/_embeddings") == expected


@pytest.fixture(params=[False, True], ids=["score", "rewrite"])
def run(request, scorer, shards, tmp_path):
    """Run into ``out``, or another folder; how many samples were scored."""

    def run(embeddings: str | None, output: str = "out", **options) -> int:
        plain = {"shards": shards, "output": tmp_path / output, "embeddings": embeddings, **OPTIONS, **options}
        config = RewriteConfig(threshold=0.1, **plain) if request.param else ScoreConfig(**plain)
        return process_shards(config, scorer).num_scored

    return run


NUM_SAMPLES = NUM_SHARDS * PER_SHARD + 3


def test_a_run_that_saves_them_scores_again_what_has_none(run, tmp_path):
    assert [run(dtype) for dtype in (None, "fp16", "fp16", None)] == [NUM_SAMPLES, NUM_SAMPLES, 0, 0]
    assert run("fp16", "fresh") == NUM_SAMPLES
    (tmp_path / "out/_embeddings/00001.text.npy").unlink()
    assert run("fp16") == PER_SHARD
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


def test_those_of_another_type_are_replaced_only_where_that_is_asked_for(run, tmp_path):
    run("fp16")
    (tmp_path / "out/_embeddings/00002.text.npy").unlink()  # a shard that has to be scored again does not touch them
    before = bits(tmp_path / "out")
    with pytest.raises(ValueError, match=r"has embeddings in fp16, and fp32 is asked for; choose .* --overwrite"):
        run("fp32")
    assert bits(tmp_path / "out") == before
    assert run("fp32", overwrite=True) == run("fp32", "fresh") == NUM_SAMPLES
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


def test_they_are_kept_where_a_shard_is_scored_again_for_something_else(run, tmp_path):
    run("fp16", columns="json:a")
    assert run(None, columns="json:b=text") == NUM_SAMPLES
    run("fp16", "fresh", columns="json:a,json:b=text")
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


@pytest.mark.parametrize("reduce", ["max", "mean", "min"])
def test_of_several_captions_the_one_that_counts_is_saved(clip_folder, tmp_path, reduce):
    scorer = ClipScorer(clip_folder, device="cpu", reduce=reduce)
    captions = [["a red square", "a dog", "number 7"], ["one"], ["two of them", "three"]]
    samples = [
        {"jpg": encoded(photo(seed)), "json": json.dumps({"captions": texts}).encode()}
        for seed, texts in enumerate(captions)
    ]
    write_shard(tmp_path / "in/0.tar", samples)
    config = ScoreConfig(
        shards=f"{tmp_path}/in/0.tar", output=tmp_path / "out", caption="json:captions", embeddings="fp32", **OPTIONS
    )
    process_shards(config, scorer)
    table, embeddings = opened(tmp_path / "out")["0"]
    for row, (sample, texts) in enumerate(zip(samples, captions, strict=True)):
        image, _ = decode_members(sample, config.layout, scorer.preprocess.view)
        pairs = [scorer.preprocess.open_pair(image.image, text) for text in texts]
        pixel_values, tokens = scorer.preprocess.collate(pairs)
        images, own = (part.numpy() for part in scorer.fast(pixel_values, tokens.input_ids))
        similarities = (images * own).sum(axis=1)
        chosen = {"max": own[similarities.argmax()], "min": own[similarities.argmin()], "mean": own.mean(axis=0)}
        expected = chosen[reduce] / np.linalg.norm(chosen[reduce])
        np.testing.assert_allclose(embeddings.text[row], expected, atol=1e-5)
        if reduce != "mean":
            assert products(embeddings)[row] == pytest.approx(table.scores[row], abs=1e-6)


def test_of_mirrored_images_the_mean_is_made_of_length_one(clip_folder, shards, tmp_path):
    scorer = ClipScorer(clip_folder, device="cpu", flip=True)
    process_shards(ScoreConfig(shards=shards, output=tmp_path, embeddings="fp32", **OPTIONS), scorer)
    table, embeddings = opened(tmp_path)["00000"]
    np.testing.assert_allclose(np.linalg.norm(embeddings.image[table.usable], axis=1), 1.0, atol=1e-5)


def test_those_that_something_deletes_while_the_run_goes_on_are_failures(scorer, shards, tmp_path):
    deleted = tmp_path / "out/_embeddings/00000.text.npy"
    config = ScoreConfig(shards=shards, output=tmp_path / "out", embeddings="fp16", **OPTIONS)
    tally = process_shards(config, scorer, on_progress=lambda tally: deleted.unlink(missing_ok=True))
    [why] = tally.failed.values()
    assert "something has deleted it" in why
    assert process_shards(config, scorer).num_scored == PER_SHARD
    assert deleted.is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "bf16"}, "embeddings is 'bf16'; use fp16 or fp32, or leave it out"),
        ({"embeddings": "fp16", "scores": "scores"}, "embeddings are saved when shards are scored"),
    ],
)
def test_what_can_not_be_saved_is_refused(shards, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RewriteConfig(shards=shards, output=tmp_path, **options)
