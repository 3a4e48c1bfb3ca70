"""Several captions of one image: each is scored, the image is encoded once."""

import json

import numpy as np
import pytest
import torch
from PIL import ImageOps

from clipfilter_wds.cli import main
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.preprocess.image import RgbImage
from clipfilter_wds.preprocess.tokens import NO_CAPTION
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from tests.support.toys import Reference, encoded, make_clip, photo, write_shard

CAPTIONS = [["a cat"], ["two dogs", "a very long caption of a dog " * 9, "dog"], ["a bird", "  ", "a plane"]]
REDUCTIONS = {"max": max, "mean": np.mean, "min": min}


@pytest.fixture(scope="module")
def expected(clip_folder):
    """Per image, the similarity of each of its captions that is not blank, by the plain loop."""
    reference = Reference(clip_folder)
    return [
        [reference.score(photo(number), caption) for caption in captions if caption.strip()]
        for number, captions in enumerate(CAPTIONS)
    ]


@pytest.fixture(scope="module")
def images():
    """Lossless, so that the plain loop sees the same pixels."""
    return [encoded(photo(number), "PNG") for number in range(len(CAPTIONS))]


@pytest.fixture(scope="module")
def as_json_list(images, tmp_path_factory):
    samples = [
        {"png": image, "json": json.dumps({"texts": captions}).encode()}
        for image, captions in zip(images, CAPTIONS, strict=True)
    ]
    samples.append({"png": images[0], "json": b'{"texts": [" ", ""]}'})
    samples.append({"png": images[0], "json": b'{"texts": []}'})
    return write_shard(tmp_path_factory.mktemp("list") / "00000.tar", samples)


@pytest.fixture(scope="module")
def as_members(images, tmp_path_factory):
    samples = [
        {"png": image, **{f"{number}.txt": caption.encode() for number, caption in enumerate(captions)}}
        for image, captions in zip(images, CAPTIONS, strict=True)
    ]
    return write_shard(tmp_path_factory.mktemp("members") / "00000.tar", samples)


@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("kept_as", ["list", "members"])
def test_the_score_is_reduced_from_those_of_all_captions(
    how, kept_as, as_json_list, as_members, expected, clip_folder, tmp_path
):
    shard, caption = {"list": (as_json_list, "json:texts"), "members": (as_members, "0.txt,1.txt,2.txt")}[kept_as]
    options = ["--caption", caption, "--reduce", how, "--model", str(clip_folder), "--num_workers", "0"]
    with pytest.raises(SystemExit) as ended:
        main(["score", str(shard), "--output", str(tmp_path / "out"), "--device", "cpu", *options])
    assert ended.value.code == 0
    scores = ShardScores.read(tmp_path / "out" / "00000.parquet")
    reduced = [REDUCTIONS[how](similarities) for similarities in expected]
    np.testing.assert_allclose(scores.scores[:3], reduced, rtol=0, atol=1e-5)
    assert scores.table["truncated"].to_pylist()[:3] == [False, True, False]
    assert scores.table["reason"].to_pylist()[3:] == (["blank_caption", "missing_caption"] if kept_as == "list" else [])
    assert scores.metadata.fingerprint["reduce"] == how


def test_each_image_is_encoded_once(as_json_list, clip_folder, monkeypatch):
    scorer = ClipScorer(clip_folder, device="cpu")
    num_images = []
    encode = scorer.exact.encode_image

    def encode_image(pixel_values, **options):
        num_images.append(len(pixel_values))
        return encode(pixel_values, **options)

    monkeypatch.setattr(scorer.exact, "encode_image", encode_image)
    dataset = ClipWebDataset(as_json_list, scorer.preprocess, layout=SampleLayout(caption="json:texts"))
    (batch,) = ClipFilterLoader(dataset, scorer, threshold=None, batch_size=8)
    assert num_images == [3]
    assert batch["text"] == ["a cat", CAPTIONS[1], ["a bird", "a plane"]]


def test_low_precision_decides_as_float32_does(tmp_path):
    folder = make_clip(tmp_path, image_size=64, width=256, seed=3)
    fast, exact = (ClipScorer(folder, device="cpu", precision=precision) for precision in ("bf16", "fp32"))
    pairs = [
        fast.preprocess.prepare(RgbImage.of(photo(seed)), [f"{seed}", "x " * seed][: 1 + seed % 2])
        for seed in range(40)
    ]
    pixel_values, tokens = fast.preprocess.collate(pairs)
    assert tokens.input_ids.shape[:2] == (40, 2)
    assert (tokens.input_ids[0, 1] == NO_CAPTION).all()
    reference = exact(pixel_values, tokens.input_ids).numpy()
    for threshold in map(float, np.sort(reference)[-6:]):
        scores = Recheck(fast, threshold)(pixel_values, tokens.input_ids).scores
        np.testing.assert_array_equal(scores >= threshold, reference >= threshold)


def test_flip_is_the_mean_with_the_mirrored_image(clip_folder, images):
    plain, flipping = ClipScorer(clip_folder, device="cpu"), ClipScorer(clip_folder, device="cpu", flip=True)
    upright = [plain.preprocess.prepare(RgbImage.of(photo(seed, (40, 40))), ["a caption"]) for seed in range(5)]
    mirrored = [
        plain.preprocess.prepare(RgbImage.of(ImageOps.mirror(photo(seed, (40, 40)))), ["a caption"])
        for seed in range(5)
    ]
    scores = [plain(pixels, tokens.input_ids) for pixels, tokens in map(plain.preprocess.collate, (upright, mirrored))]
    pixels, tokens = flipping.preprocess.collate(upright)
    torch.testing.assert_close(flipping(pixels, tokens.input_ids), sum(scores) / 2, rtol=0, atol=1e-5)
    assert not torch.allclose(scores[0], scores[1], atol=1e-4)
    assert flipping.fingerprint != plain.fingerprint


def test_the_preprocess_stage_gives_all_captions(scorer, images):
    sample = {"png": images[0], "json": b'{"texts": ["one", "another"]}'}
    prepared = scorer.preprocess(sample, SampleLayout(caption="json:texts"))
    assert prepared["input_ids"].shape == (2, 77)


def test_an_unknown_reduction_is_refused(clip_folder):
    with pytest.raises(ValueError, match="use max, mean or min"):
        ClipScorer(clip_folder, device="cpu", reduce="median")
