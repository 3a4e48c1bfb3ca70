"""A model whose activations really overflow: what it gives no number for is dropped, wherever scores are used."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset, ImageClipFilter
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import DropReason
from tests.support.toys import encoded, make_clip, photo, tar_members, write_shard

#: Grey levels of the images; the model overflows on the bright ones.
LEVELS = [114, 250, 116, 112, 255, 115, 245, 113]
BRIGHT = {number for number, level in enumerate(LEVELS) if level > 200}
GREY = sorted(set(range(len(LEVELS))) - BRIGHT)


def brightness_to_infinity(folder: Path, weight: float) -> Path:
    """Scale the patch embedding's first channel: 1,400 ``weight`` where an image is white, about 0 where it is grey."""
    weights = load_file(folder / "model.safetensors")
    name = "vision_model.embeddings.patch_embedding.weight"
    weights[name][0] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> ClipScorer:
    folder = make_clip(tmp_path_factory.mktemp("overflowing"))
    return ClipScorer(brightness_to_infinity(folder, 1e17), device="cpu")


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    noise = np.asarray(photo(1), dtype=int) % 8
    return [encoded(Image.fromarray(np.uint8(np.minimum(level + noise, 255))), "PNG") for level in LEVELS]


@pytest.fixture(scope="module")
def shard(images, tmp_path_factory) -> Path:
    samples = [{"png": image, "txt": f"caption {number}".encode()} for number, image in enumerate(images)]
    return write_shard(tmp_path_factory.mktemp("shards") / "0.tar", samples)


def test_the_model_overflows_on_bright_images_only(overflowing, images):
    pairs = [overflowing.preprocess.open_pair(image, "caption") for image in images]
    pixel_values, tokens = overflowing.preprocess.collate(pairs)
    finite = overflowing(pixel_values, tokens.input_ids).isfinite()
    assert {number for number, ok in enumerate(finite.tolist()) if not ok} == BRIGHT


@pytest.mark.parametrize("threshold", [-1.0, 0.0])
def test_rewrite_drops_them_whatever_the_threshold(overflowing, shard, tmp_path, threshold):
    config = RewriteConfig(shards=shard, output=tmp_path / "out", threshold=threshold, num_workers=0, batch_size=3)
    tally = process_shards(config, overflowing)
    assert tally.counts.dropped == {DropReason.NOT_FINITE: len(BRIGHT)}
    kept = {int(name.partition(".")[0]) for name, _ in tar_members(tmp_path / "out" / "0.tar")}
    assert kept == set(GREY)


def test_what_overflows_in_low_precision_only_is_scored_in_float32_and_not_dropped(shard, tmp_path):
    folder = brightness_to_infinity(make_clip(tmp_path / "clip"), 100.0)
    tables = {}
    for precision in ("fp16", "fp32"):
        scorer = ClipScorer(folder, device="cpu", precision=precision)
        config = RewriteConfig(shards=shard, output=tmp_path / precision, threshold=0.0, num_workers=0)
        assert DropReason.NOT_FINITE not in process_shards(config, scorer).counts.dropped
        tables[precision] = ShardScores.read(tmp_path / precision / "_scores" / "0.parquet").scores
    bright = sorted(BRIGHT)
    np.testing.assert_allclose(tables["fp16"][bright], tables["fp32"][bright], atol=1e-6)
    assert np.isfinite(tables["fp16"]).all()


def test_a_score_table_holds_the_reason_and_only_finite_numbers(overflowing, shard, tmp_path):
    process_shards(ScoreConfig(shards=shard, output=tmp_path, num_workers=0), overflowing)
    scores = ShardScores.read(tmp_path / "0.parquet")
    assert np.isfinite(scores.scores).all()
    reasons = scores.table["reason"].to_pylist()
    assert {number for number, reason in enumerate(reasons) if reason == "not_finite"} == BRIGHT
    assert (scores.scores[GREY] != 0).all()


@pytest.mark.parametrize("threshold", [0.0, None])
def test_a_loader_never_hands_them_to_training(overflowing, shard, threshold):
    dataset = ClipWebDataset(shard, overflowing.preprocess)
    loader = ClipFilterLoader(dataset, overflowing, threshold=threshold, batch_size=2, score_batch_size=3)
    batches = list(loader)
    assert [int(key) for batch in batches for key in batch["__key__"]] == GREY
    assert all(batch["score"].isfinite().all() for batch in batches)
    assert (loader.stats.seen, loader.stats.dropped) == (len(LEVELS), {DropReason.NOT_FINITE: len(BRIGHT)})


def test_a_loader_around_any_batches_drops_them_with_all_their_columns(overflowing, images):
    pairs = [overflowing.preprocess.open_pair(image, "caption") for image in images]
    pixel_values, tokens = overflowing.preprocess.collate(pairs)
    batch = {"pixel_values": pixel_values, "input_ids": tokens.input_ids, "number": torch.arange(len(images))}
    batch["reason"] = [""] * len(images)
    loader = ClipFilterLoader([batch], overflowing, threshold=0.0)
    assert [number for out in loader for number in out["number"].tolist()] == GREY
    assert loader.stats.dropped == {DropReason.NOT_FINITE: len(BRIGHT)}


class Memory:
    """A storage of one table."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table

    def read(self, output_type: str) -> pd.DataFrame:
        return self.table

    def write(self, table: pd.DataFrame) -> None:
        self.table = table


def test_a_table_drops_their_rows_and_says_why(overflowing, images, tmp_path, caplog):
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    storage = Memory(pd.DataFrame({"image": map(str, paths), "caption": "caption"}))
    operator = ImageClipFilter(overflowing.model_name, device="cpu")
    operator.run(storage, threshold=1e-9)
    assert not {Path(path).stem for path in storage.table["image"]} & set(map(str, BRIGHT))
    assert "scored 0.0 of 8 pairs as not_finite: 3, the first in row 1" in caplog.text


def scaled(folder: Path, factor: float) -> Path:
    """Multiply the length of a model's image embeddings."""
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("factor", [0.0, 1e30])
def test_embeddings_of_no_or_infinite_length_have_no_cosine(images, tmp_path, factor):
    scorer = ClipScorer(scaled(make_clip(tmp_path / "clip"), factor), device="cpu")
    pair = scorer.preprocess.open_pair(images[0], "caption")
    pixel_values, tokens = scorer.preprocess.collate([pair])
    assert scorer(pixel_values, tokens.input_ids).isnan().all()


def test_a_model_of_zeros_keeps_nothing_at_threshold_0_and_says_why(shard, tmp_path):
    scorer = ClipScorer(scaled(make_clip(tmp_path / "clip"), 0.0), device="cpu")
    config = RewriteConfig(shards=shard, output=tmp_path / "out", threshold=0.0, num_workers=0)
    assert process_shards(config, scorer).counts.dropped == {DropReason.NOT_FINITE: len(LEVELS)}


@pytest.mark.parametrize("factor", [1e-15, 1e15])
def test_the_length_of_embeddings_does_not_change_a_score(images, tmp_path, factor):
    scores = []
    for name, by in (("as it is", 1.0), ("scaled", factor)):
        scorer = ClipScorer(scaled(make_clip(tmp_path / name), by), device="cpu")
        pairs = [scorer.preprocess.open_pair(image, f"caption {number}") for number, image in enumerate(images)]
        pixel_values, tokens = scorer.preprocess.collate(pairs)
        scores.append(scorer(pixel_values, tokens.input_ids))
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)
