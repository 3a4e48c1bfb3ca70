import io
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from clipfilter_wds.demo.drawing import draw
from clipfilter_wds.demo.scenes import random_scene
from clipfilter_wds.models.dual_encoder import ModelError
from clipfilter_wds.models.loading import BUNDLED_MODELS
from clipfilter_wds.models.scorer import ClipScorer
from tests.support.image_processors import as_seen, options_of
from tests.support.toys import Reference, encoded, make_clip, photo

ODD_CAPTIONS = [
    "a",
    "two red circles above a large blue star on a plain background",
    " ".join(["word"] * 300),
    "a photo 📷 of a 🐈‍⬛ and 🇪🇺",
    "صورة لقطة على الطاولة",
    "nul \x00 byte",
    b"not \xff\xfe utf-8".decode(errors="replace"),
    "  Leading, trailing   and\tinner white space \n",
    "<|endoftext|> in the caption",
    "ÅNGSTRÖM ﬁ ①",
]


def odd_images() -> dict[str, bytes]:
    base = photo(1, (120, 90))
    return {
        "jpeg": encoded(base, quality=85),
        "scene": encoded(draw(random_scene(random.Random(5), held_out=True)), quality=90),
        "large jpeg": encoded(photo(2, (640, 480)), quality=90),
        **{f"margin {width}": encoded(photo(width, (width, 100)), quality=90) for width in range(101, 141, 3)},
        **{f"margin {height}": encoded(photo(height, (100, height)), quality=90) for height in range(102, 142, 3)},
        "progressive": encoded(base, quality=85, progressive=True),
        "greyscale": encoded(base.convert("L"), "PNG"),
        "palette": encoded(base.quantize(16), "PNG"),
        "palette with transparency": encoded(base.quantize(16), "PNG", transparency=3),
        "rgb with a transparent colour": encoded(base.quantize(8).convert("RGB"), "PNG", transparency=(0, 0, 0)),
        "rgba": encoded(Image.merge("RGBA", (*base.split(), base.split()[0])), "PNG"),
        "grey with alpha": encoded(base.convert("LA"), "PNG"),
        "one bit": encoded(base.convert("1"), "PNG"),
        "cmyk": encoded(base.convert("CMYK"), quality=90),
        "wide": encoded(photo(3, (2000, 1)), "PNG"),
        "high": encoded(photo(4, (1, 2000)), "PNG"),
        "one pixel": encoded(photo(5, (1, 1)), "PNG"),
        "webp": encoded(base, "WEBP"),
        "gif": encoded(base, "GIF", save_all=True, append_images=[photo(6, (120, 90))]),
        "exif rotated": encoded(base, quality=85, exif=_rotated_exif()),
    }


def _rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture(scope="module", params=["demo-tiny", "random 32", "random 64"])
def model(request, tmp_path_factory, clip_folder):
    folder = tmp_path_factory.mktemp("model")
    return {
        "demo-tiny": lambda: BUNDLED_MODELS["demo-tiny"],
        "random 32": lambda: clip_folder,
        "random 64": lambda: make_clip(folder, image_size=64, patch_size=8, width=64, seed=3),
    }[request.param]()


def test_scores_and_decisions_equal_the_plain_loop_for_odd_images_and_captions(model):
    reference, scorer = Reference(model), ClipScorer(model, device="cpu")
    pairs = [
        (data, ODD_CAPTIONS[(first + second) % len(ODD_CAPTIONS)])
        for first, data in enumerate(odd_images().values())
        for second in range(3)
    ]
    expected = np.array([reference.score(Image.open(io.BytesIO(data)), caption) for data, caption in pairs])
    pixel_values, tokens = scorer.preprocess.collate([scorer.preprocess.open_pair(*pair) for pair in pairs])
    scores = scorer(pixel_values, tokens.input_ids).numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 0.1  # the scores spread, so that the comparison means something
    ranked = np.sort(expected)
    for threshold in (ranked[1:] + ranked[:-1])[np.diff(ranked) > 1e-5] / 2:
        assert ((scores >= threshold) == (expected >= threshold)).all()


def test_pixels_equal_those_of_the_image_processor(model):
    reference, scorer = Reference(model), ClipScorer(model, device="cpu")
    for data in odd_images().values():
        rgb = scorer.preprocess.view.decode(data)
        pixels = (scorer.preprocess.view(rgb)[None].float() - scorer.exact.pixel_mean) / scorer.exact.pixel_std
        processor = reference.processor.image_processor
        expected = processor(as_seen(rgb.image), return_tensors="pt", **options_of(processor)).pixel_values
        # Pillow's processors round twice, to 2.4e-7 of ours; a level of 255 is 0.015 or more.
        atol = 1e-6 if options_of(processor) else 0
        torch.testing.assert_close(pixels, expected, rtol=0, atol=atol)


def test_a_score_does_not_depend_on_the_batch_around_it(scorer):
    pairs = [scorer.preprocess.open_pair(encoded(photo(i)), "word " * (1 + 7 * i)) for i in range(9)]
    alone = [scorer(pixels, tokens.input_ids) for pixels, tokens in (scorer.preprocess.collate([p]) for p in pairs)]
    pixels, tokens = scorer.preprocess.collate(pairs)
    torch.testing.assert_close(scorer(pixels, tokens.input_ids), torch.cat(alone), rtol=0, atol=1e-6)


def test_pixels_that_were_normalised_before_are_refused(scorer):
    with pytest.raises(TypeError, match=r"pixel_values are torch\.float32; pass on the uint8 that scorer\.preprocess"):
        scorer(torch.zeros(1, 3, 32, 32), torch.zeros(1, 8, dtype=torch.int64))


def test_an_empty_batch_has_no_scores(scorer):
    pixels, tokens = scorer.preprocess.collate([])
    assert scorer(pixels, tokens.input_ids).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_gpu_is_given_a_batch_without_waiting_for_it(clip_folder, precision):
    scorer = ClipScorer(clip_folder, device="cuda", precision=precision)
    pairs = [scorer.preprocess.open_pair(encoded(photo(seed)), "word " * seed) for seed in range(1, 20)]
    pixel_values, tokens = scorer.preprocess.collate(pairs)
    scores = scorer(pixel_values, tokens.input_ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = scorer(pixel_values, tokens.input_ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, scores)
    expected = ClipScorer(clip_folder, device="cpu", precision="fp32")(pixel_values, tokens.input_ids)
    torch.testing.assert_close(again.cpu(), expected, rtol=0, atol=1e-5 if precision == "fp32" else 1e-2)


def test_fingerprint_tells_weights_apart_but_not_folders(clip_folder, tmp_path):
    first = ClipScorer(clip_folder, device="cpu").fingerprint
    moved = ClipScorer(shutil.copytree(clip_folder, tmp_path / "moved"), device="cpu").fingerprint
    other = ClipScorer(make_clip(tmp_path / "other", seed=9), device="cpu").fingerprint
    assert {**moved, "model": first["model"]} == first
    assert {name for name in first if first[name] != other[name]} == {"model", "weights"}


class TestUnusableModels:
    """Each names what is wrong and what to do, in one line."""

    def check(self, model, *parts: str) -> None:
        with pytest.raises(ModelError) as raised:
            ClipScorer(model, device="cpu")
        message = str(raised.value)
        assert "\n" not in message
        assert all(part in message for part in parts), message

    def test_missing_folder(self, tmp_path):
        self.check(tmp_path / "nowhere", "there is no model folder", "demo-tiny")

    def test_folder_without_config(self, tmp_path):
        self.check(tmp_path, "config.json")

    def test_pickled_weights_are_never_loaded(self, clip_folder, tmp_path):
        folder = shutil.copytree(clip_folder, tmp_path / "pickled")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        self.check(folder, "save_pretrained", "pytorch_model.bin")

    def test_model_of_another_kind(self, tmp_path):
        config = BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
        )
        BertModel(config).save_pretrained(tmp_path)
        self.check(tmp_path, "'bert'", "not a CLIP")

    def test_broken_weights(self, clip_folder, tmp_path):
        folder = shutil.copytree(clip_folder, tmp_path / "broken")
        (folder / "model.safetensors").write_bytes(b"not safetensors")
        self.check(folder, "can't load")

    def test_missing_weights_are_not_made_up(self, clip_folder, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(clip_folder, tmp_path / "partial")
        weights = load_file(folder / "model.safetensors")
        del weights["visual_projection.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.check(folder, "visual_projection.weight", "random")

    def test_hub_that_cannot_be_reached(self):
        code = "from clipfilter_wds import ClipScorer; ClipScorer('some/clip-that-is-not-cached')"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        assert "ModelError: can't load 'some/clip-that-is-not-cached' from the Hugging Face hub" in done.stderr
        assert "--local-dir" in done.stderr.splitlines()[-1]
