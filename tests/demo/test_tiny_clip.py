import io
import json
import random
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

import clipfilter_wds.demo
from clipfilter_wds.demo.drawing import draw, to_jpeg
from clipfilter_wds.demo.scenes import change_one, describe, different_scene, random_scene
from tests.support.pace import FOREVER

FOLDER = Path(clipfilter_wds.demo.__file__).parent / "tiny_clip"
TRAIN = Path(__file__).parents[2] / "train_examples" / "train_tiny_clip.py"
FIGURES = json.loads((FOLDER / "clipfilter.json").read_text())


@pytest.fixture(scope="module")
def model():
    return CLIPModel.from_pretrained(FOLDER, use_safetensors=True).eval()


@pytest.fixture(scope="module")
def processor():
    return CLIPProcessor.from_pretrained(FOLDER)


@dataclass(frozen=True, kw_only=True)
class HeldOutScores:
    """Cosines of JPEG images of held-out combinations with true and with false captions."""

    matched: Tensor
    random: Tensor
    changed: Tensor


@pytest.fixture(scope="module")
def held_out(model, processor):
    rng = random.Random("other scenes than the training script ever drew")
    images, captions = [], []
    for _ in range(500):
        scene = random_scene(rng, held_out=True)
        changed, attribute = change_one(scene, rng)
        images.append(Image.open(io.BytesIO(to_jpeg(draw(scene)))))
        captions.append(
            (
                describe(scene, rng),
                describe(different_scene(scene, rng, held_out=True), rng),
                describe(changed, rng, always=(attribute,)),
            )
        )
    text = [caption for column in zip(*captions, strict=True) for caption in column]
    inputs = processor(images=images, text=text, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        output = model(**inputs)
    scores = (output.image_embeds * output.text_embeds.unflatten(0, (3, -1))).sum(-1)
    return HeldOutScores(matched=scores[0], random=scores[1], changed=scores[2])


def auc(positive: Tensor, negative: Tensor) -> float:
    labels = torch.tensor([1] * len(positive) + [0] * len(negative))
    # torchmetrics takes scores outside [0, 1] for logits.
    return binary_auroc((torch.cat([positive, negative]) + 1) / 2, labels).item()


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000


def test_everything_loads_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = CLIPModel.from_pretrained(FOLDER, use_safetensors=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        processor = CLIPProcessor.from_pretrained(FOLDER)
    assert not any(info.values())
    text = model.config.text_config
    assert (text.bos_token_id, text.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert text.vocab_size == len(tokenizer) == len(processor.tokenizer)
    assert text.max_position_embeddings == tokenizer.model_max_length
    assert processor.image_processor.crop_size["height"] == model.config.vision_config.image_size


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_becomes_known_tokens_with_one_end(processor, text):
    tokenizer = processor.tokenizer
    ids = tokenizer(text, truncation=True)["input_ids"]
    assert len(ids) <= tokenizer.model_max_length
    assert all(0 <= token < len(tokenizer) for token in ids)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_case_does_not_matter_and_padding_does_not_either(model, processor):
    captions = ["A SMALL RED CIRCLE", "a small red circle"]
    with torch.inference_mode():
        short = model.get_text_features(**processor.tokenizer(captions, return_tensors="pt")).pooler_output
        inputs = processor.tokenizer(captions, padding="max_length", return_tensors="pt")
        long = model.get_text_features(**inputs).pooler_output
    assert torch.equal(short[0], short[1])
    torch.testing.assert_close(short, long)


def test_true_captions_score_above_random_ones_on_combinations_never_trained_on(held_out):
    assert auc(held_out.matched, held_out.random) >= 0.99


def test_one_changed_attribute_is_noticed_better_than_chance(held_out):
    assert auc(held_out.matched, held_out.changed) >= FIGURES["auc_one_attribute_changed"] - 0.05 > 0.6


def test_the_threshold_keeps_true_captions_and_drops_random_ones(held_out):
    kept_true = (held_out.matched >= FIGURES["threshold"]).sum().item()
    kept_random = (held_out.random >= FIGURES["threshold"]).sum().item()
    assert kept_true / (kept_true + kept_random) > 0.9
    assert kept_true / len(held_out.matched) > 0.9


@pytest.mark.slow
def test_the_training_script_runs(tmp_path):
    output = tmp_path / "tiny_clip"
    command = [sys.executable, TRAIN, "--fast_dev_run", "true", "--output", output]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=FOREVER)
    assert {file.name for file in output.iterdir()} == {file.name for file in FOLDER.iterdir()}
    assert CLIPModel.from_pretrained(output, use_safetensors=True).config.to_dict().keys()
    assert json.loads((output / "clipfilter.json").read_text()).keys() == FIGURES.keys()
