"""Scores of other dual encoders equal those of their own libraries' plain loops."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
from clipfilter_wds.models.dual_encoder import ModelError
from clipfilter_wds.models.hugging_face import HuggingFaceTowers
from clipfilter_wds.models.open_clip import OpenClipTowers
from clipfilter_wds.models.precision import NARROW
from clipfilter_wds.models.releases import USES_DEFAULT_DTYPE
from tests.support.dual_encoders import FAMILIES, make_open_clip
from tests.support.gpu import needs_gpu
from tests.support.toys import encoded, make_clip, photo, write_shard

CAPTIONS = [
    "a red dog, 2 cats!",
    "x",
    "中文图片 a 红色的狗",
    "a caption that is far longer than any of these small text towers takes, " * 3,
    "[PAD] <pad> </s> <eos> in the caption",
    "  A Photo  OF\tsomething?  ",
]
SIZES = [(48, 40), (33, 90), (120, 51), (64, 64)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A scorer and its library's plain loop."""
    if request.param.startswith("open_clip"):
        pytest.importorskip("open_clip")
    make, reference, prefix = FAMILIES[request.param]
    folder = make(tmp_path_factory.mktemp("family") / "model")
    return ClipScorer(f"{prefix}{folder}", device="cpu", precision="fp32"), reference(folder)


def pairs() -> list[tuple[Image.Image, str]]:
    return [
        (photo(number, size), caption)
        for number, (size, caption) in enumerate(zip(SIZES * 3, CAPTIONS * 2, strict=True))
    ]


def test_scores_equal_the_plain_loop_of_the_own_library(family):
    scorer, reference = family
    expected = np.array([reference.score(*pair) for pair in pairs()])
    opened = [scorer.preprocess.open_pair(encoded(image, "PNG"), caption) for image, caption in pairs()]
    pixel_values, tokens = scorer.preprocess.collate(opened)
    np.testing.assert_allclose(scorer(pixel_values, tokens.input_ids).numpy(), expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 0.1  # the scores spread, so that the comparison means something


def test_scores_do_not_depend_on_the_padding_of_the_batch(family):
    scorer, _ = family
    opened = [scorer.preprocess.open_pair(encoded(image, "PNG"), caption) for image, caption in pairs()]
    pixel_values, tokens = scorer.preprocess.collate(opened)
    together = scorer(pixel_values, tokens.input_ids)
    alone = [
        scorer(pixels, tokens.input_ids) for pixels, tokens in (scorer.preprocess.collate([one]) for one in opened)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_loader_around_padded_batches_gives_the_same_scores(family, tmp_path):
    scorer, reference = family
    samples = [{"png": encoded(image, "PNG"), "txt": caption.encode()} for image, caption in pairs()]
    dataset = ClipWebDataset(write_shard(tmp_path / "0.tar", samples), scorer.preprocess)
    inline = [score for batch in ClipFilterLoader(dataset, scorer, threshold=None) for score in batch["score"].tolist()]
    columns = [scorer.preprocess({"png": sample["png"], "txt": sample["txt"]}) for sample in samples]
    batch = {name: torch.stack([row[name] for row in columns]) for name in ("pixel_values", "input_ids")}
    batch["reason"] = [row["reason"] for row in columns]
    around = [score for out in ClipFilterLoader([batch], scorer, threshold=None) for score in out["score"].tolist()]
    expected = [reference.score(*pair) for pair in pairs()]
    np.testing.assert_allclose(inline, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(around, expected, rtol=0, atol=1e-5)


def test_low_precision_is_near(family):
    scorer, _ = family
    fast = ClipScorer(scorer.model_name, device="cpu", precision="bf16")
    opened = [scorer.preprocess.open_pair(encoded(image, "PNG"), caption) for image, caption in pairs()]
    pixel_values, tokens = scorer.preprocess.collate(opened)
    exact, near = scorer(pixel_values, tokens.input_ids), fast(pixel_values, tokens.input_ids)
    assert 0 < (exact - near).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_a_training_script_changes_no_bit(family, dtype):
    scorer, _ = family
    if USES_DEFAULT_DTYPE and dtype == torch.bfloat16 and isinstance(scorer.exact.towers, HuggingFaceTowers):
        pytest.skip("refused, as the next test has it")
    opened = [scorer.preprocess.open_pair(encoded(image, "PNG"), caption) for image, caption in pairs()]
    pixel_values, tokens = scorer.preprocess.collate(opened)
    torch.set_default_dtype(dtype)
    try:
        again = ClipScorer(scorer.model_name, device="cpu", precision="fp32")
        found = again(pixel_values, tokens.input_ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, scorer(pixel_values, tokens.input_ids))


def test_a_model_is_loaded_on_the_cpu_whatever_the_default_device_of_a_training_script(family):
    scorer, _ = family
    with torch.device("meta"):
        again = ClipScorer(scorer.model_name, device="cpu", precision="fp32")
    assert again.fingerprint == scorer.fingerprint
    assert again.device.type == "cpu"


@pytest.mark.skipif(USES_DEFAULT_DTYPE, reason="refused")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_neither_does_it_where_layers_are_rewritten(tmp_path, precision):
    options = {"device": "cpu", "precision": precision}
    scorer = ClipScorer(make_clip(tmp_path, width=NARROW), **options)
    pixel_values = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    input_ids = scorer.preprocess.tokenize([["a cat"], ["a dog on a sofa"], ["red"], ["two cats"]]).input_ids
    expected = scorer(pixel_values, input_ids)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(scorer(pixel_values, input_ids), expected)
        assert torch.equal(ClipScorer(scorer.model_name, **options)(pixel_values, input_ids), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_release_that_would_compute_in_a_narrow_default_dtype_is_refused(clip_folder, monkeypatch):
    scorer = ClipScorer(clip_folder, device="cpu")
    ids = scorer.preprocess.tokenize([["a cat"]]).input_ids
    monkeypatch.setattr("clipfilter_wds.models.hugging_face.USES_DEFAULT_DTYPE", True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(ModelError, match=r"default dtype, which is torch\.bfloat16 here.*transformers>=5"):
            scorer.exact.encode_text(ids)
        with pytest.raises(ModelError, match="default dtype"):
            ClipScorer(clip_folder, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert scorer.exact.encode_text(ids).shape[0] == 1


def test_training_a_module_that_holds_a_scorer_changes_no_bit(family):
    scorer, _ = family
    opened = [scorer.preprocess.open_pair(encoded(image, "PNG"), caption) for image, caption in pairs()]
    pixel_values, tokens = scorer.preprocess.collate(opened)
    expected = scorer(pixel_values, tokens.input_ids)
    holder = torch.nn.Sequential(scorer).train()
    assert torch.equal(holder[0](pixel_values, tokens.input_ids), expected)


@needs_gpu
@pytest.mark.gpu
def test_on_a_gpu_every_family_is_captured_and_scores_are_those_of_a_cpu(family, caplog):
    scorer, _ = family
    opened = [scorer.preprocess.open_pair(encoded(image, "PNG"), caption) for image, caption in pairs()]
    pixel_values, tokens = scorer.preprocess.collate(opened)
    expected = scorer(pixel_values, tokens.input_ids)
    for precision, error in (("fp32", 1e-5), ("fp16", 0.05), ("bf16", 0.05)):
        on_gpu = ClipScorer(scorer.model_name, device="cuda", precision=precision)
        for _ in range(2):
            found = on_gpu(pixel_values, tokens.input_ids).cpu()
            torch.testing.assert_close(found, expected, rtol=0, atol=error)
    assert not [record for record in caplog.records if "CUDA graphs" in record.message]


def test_the_fingerprint_names_the_family_and_how_captions_are_padded(family):
    scorer, _ = family
    fingerprint = json.loads(json.dumps(scorer.fingerprint))
    assert fingerprint["family"] in ("chinese_clip", "altclip", "metaclip_2", "siglip", "open_clip")
    sees_padding = isinstance(scorer.exact.towers, OpenClipTowers) or fingerprint["family"] == "siglip"
    assert fingerprint["pads_to_max"] == sees_padding
    own = "pillow_floor" if transformers.__version__.startswith("4.") else "torchvision"
    assert fingerprint["resampler"] == ("pillow" if fingerprint["family"] == "open_clip" else own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_open_clip(tmp_path_factory.mktemp("open_clip") / "model")


class TestUnusableOpenClips:
    """Each names what is wrong and what to do."""

    def check(self, model: str, *parts: str) -> None:
        with pytest.raises(ModelError) as raised:
            ClipScorer(model, device="cpu")
        assert all(part in str(raised.value) for part in parts), raised.value

    def test_pickled_weights_are_never_loaded(self, folder, tmp_path):
        pickled = shutil.copytree(folder, tmp_path / "pickled")
        (pickled / "open_clip_model.safetensors").rename(pickled / "open_clip_pytorch_model.bin")
        self.check(f"open_clip:{pickled}", "Pickled weights", "safetensors.torch.save_file")

    def test_folder_of_another_kind(self, clip_folder):
        self.check(f"open_clip:{clip_folder}", "open_clip_config.json")

    def test_a_folder_of_open_clip_without_the_prefix(self, folder):
        self.check(str(folder), f"open_clip:{folder}")

    def test_missing_weights_are_not_made_up(self, folder, tmp_path):
        from safetensors.torch import load_file, save_file

        partial = shutil.copytree(folder, tmp_path / "partial")
        weights = load_file(partial / "open_clip_model.safetensors")
        del weights["visual.proj"]
        save_file(weights, partial / "open_clip_model.safetensors")
        self.check(f"open_clip:{partial}", "can't load", "visual.proj")

    def test_images_that_are_padded(self, folder, tmp_path):
        longest = shutil.copytree(folder, tmp_path / "longest")
        config = json.loads((longest / "open_clip_config.json").read_text())
        config["preprocess_cfg"]["resize_mode"] = "longest"
        (longest / "open_clip_config.json").write_text(json.dumps(config))
        self.check(f"open_clip:{longest}", "'longest'", "squash")
