from dataclasses import fields

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CustomTextCLIP

from clipfilter_wds.models.hugging_face import HuggingFaceTowers
from clipfilter_wds.models.plain_clip import as_plain_clip

IMAGE = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 16, "layers": 2}
TEXT = {"context_length": 20, "vocab_size": 100, "width": 48, "heads": 4, "layers": 2}
END = 97


def make(kind=CLIP, *, image=None, text=None, **options):
    if unknown := {*(text or {})} - {field.name for field in fields(CLIPTextCfg)}:
        pytest.skip(f"this release of open_clip knows no {unknown}")
    torch.manual_seed(0)
    model = kind(24, {**IMAGE, **(image or {})}, {**TEXT, **(text or {})}, **options).eval().requires_grad_(False)
    for weight in model.parameters():  # norms too, which open_clip leaves as ones and zeros
        weight += 0.1 * torch.randn(weight.shape)
    return model


def token_ids():
    """Captions of up to 20 tokens, behind whose end there is padding."""
    ids = torch.zeros(5, 20, dtype=torch.int64)
    for row, length in enumerate((3, 20, 7, 12, 4)):
        ids[row, :length] = torch.randint(1, 90, (length,), generator=torch.Generator().manual_seed(row))
        ids[row, length - 1] = END
    return ids


PLAIN = {
    "as OpenAI's": {"quick_gelu": True},
    "as LAION's": {},
    "a text tower of its own": {"kind": CustomTextCLIP},
    "an end token": {"text": {"pool_type": "eos", "eos_id": END}},
    "GELU by tanh": {"text": {"act_kwargs": {"approximate": "tanh"}}},
    "other norms": {"image": {"norm_kwargs": {"eps": 1e-3}}, "text": {"norm_kwargs": {"eps": 1e-2}}},
    "norm behind pooling": {"image": {"final_ln_after_pool": True}},
    "patches dropped in training": {"image": {"patch_dropout": 0.5}},
    "wider MLPs": {"image": {"mlp_ratio": 3.0}, "text": {"mlp_ratio": 5.0}},
}


@pytest.mark.parametrize("case", PLAIN)
@torch.inference_mode()
def test_embeddings_are_open_clips(case):
    model = make(**PLAIN[case])
    plain = as_plain_clip(model)
    towers = HuggingFaceTowers(plain, pad_id=None)
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(towers.image_features(pixels), model.encode_image(pixels), atol=1e-5, rtol=1e-5)
    ids = token_ids()
    expected = model.encode_text(ids)
    torch.testing.assert_close(towers.text_features(ids), expected, atol=1e-5, rtol=1e-5)
    short = ids[2:3, :8]  # open_clip itself takes captions of full length only
    torch.testing.assert_close(towers.text_features(short), expected[2:3], atol=1e-5, rtol=1e-5)


OTHERS = {
    "images averaged": {"image": {"pool_type": "avg"}},
    "no norm before the layers": {"image": {"no_ln_pre": True}},
    "images pooled by attention": {"image": {"attentional_pool": True}},
    "scaled layers": {"image": {"ls_init_value": 0.1}},
    "scaled layers of the text tower": {"text": {"ls_init_value": 0.1}},
    "normalised queries": {"image": {"qk_norm": True}},
    "tokens that see what follows": {"text": {"no_causal_mask": True}},
    "a token for the caption": {"kind": CustomTextCLIP, "text": {"embed_cls": True}},
    "the last token": {"text": {"pool_type": "last"}},
    "the end token that stands for the largest": {"text": {"pool_type": "eos", "eos_id": 2}},
    "a projection with bias": {"text": {"proj_bias": True}},
    "norms that differ": {"image": {"norm_kwargs": {"eps": 1e-3}}, "norm": True},
    "a ResNet": {"image": {"layers": [1, 1, 1, 1], "width": 16}},
    "oblong images": {"image": {"image_size": (32, 48)}},
    "oblong patches": {"image": {"patch_size": (16, 8)}},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_open_clip_has_added_stays_open_clips(case):
    options = dict(OTHERS[case])
    has_other_norm = options.pop("norm", False)
    model = make(**options)
    if has_other_norm:
        model.visual.ln_pre.eps = 1e-5
    assert as_plain_clip(model) is None


def test_weights_are_not_copied():
    model = make()
    memory = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    plain = as_plain_clip(model)
    shared = [weight.untyped_storage().data_ptr() in memory for weight in plain.parameters()]
    assert all(shared)
