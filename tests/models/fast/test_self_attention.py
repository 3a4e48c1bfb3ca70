import pytest
import torch
from torch import nn

from clipfilter_wds.models.fast.optimize import optimize_layers
from clipfilter_wds.models.fast.self_attention import FastMultiheadAttention

N, T, WIDTH, HEADS = 3, 7, 32, 4


def usual():
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval().requires_grad_(False)


def mask_of(kind):
    causal = torch.full((T, T), float("-inf")).triu_(1)
    return {"none": None, "of all": causal, "of each head": causal.repeat(N * HEADS, 1, 1)}[kind]


@pytest.mark.parametrize("kind", ["none", "of all", "of each head"])
@torch.inference_mode()
def test_it_attends_as_torchs_own(kind):
    attention, features, mask = usual(), torch.randn(N, T, WIDTH), mask_of(kind)
    expected, _ = attention(features, features, features, need_weights=False, attn_mask=mask)
    found, _ = FastMultiheadAttention(attention)(features, features, features, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_under_autocast_it_is_rounded_no_worse():
    attention, features, mask = usual(), torch.randn(N, T, WIDTH), mask_of("of all")
    exact, _ = attention(features, features, features, need_weights=False, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rounded, _ = attention(features, features, features, need_weights=False, attn_mask=mask)
        found, _ = FastMultiheadAttention(attention).bfloat16()(features, features, features, attn_mask=mask)
    assert found.dtype == torch.bfloat16
    assert (found - exact).square().mean() < 1.5 * (rounded - exact).square().mean()


@torch.inference_mode()
def test_some_tokens_may_attend_to_others():
    attention, queries, features = usual(), torch.randn(N, 2, WIDTH), torch.randn(N, T, WIDTH)
    expected, _ = attention(queries, features, features)
    found, _ = FastMultiheadAttention(attention)(queries, features, features)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_only_modules_of_known_kinds_and_shapes_are_replaced():
    from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock

    layers = nn.Sequential(ResidualAttentionBlock(WIDTH, HEADS), AttentionalPooler(WIDTH, 16, HEADS))
    seen_first = nn.MultiheadAttention(WIDTH, HEADS)
    layers.append(ResidualAttentionBlock(WIDTH, HEADS))
    layers[2].attn = seen_first
    optimize_layers(layers)
    kinds = [type(layer.attn).__name__ for layer in layers]
    assert kinds == ["FastMultiheadAttention", "MultiheadAttention", "MultiheadAttention"]
