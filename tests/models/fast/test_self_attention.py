import pytest
import torch
from torch import nn

from clipfilter_wds.models.fast.image_tower import optimize_layers
from clipfilter_wds.models.fast.self_attention import MaskedSelfAttention

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
    found, _ = MaskedSelfAttention(attention)(features, features, features, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_under_autocast_it_is_rounded_no_worse():
    attention, features, mask = usual(), torch.randn(N, T, WIDTH), mask_of("of all")
    exact, _ = attention(features, features, features, need_weights=False, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rounded, _ = attention(features, features, features, need_weights=False, attn_mask=mask)
        found, _ = MaskedSelfAttention(attention).bfloat16()(features, features, features, attn_mask=mask)
    assert found.dtype == torch.bfloat16
    assert (found - exact).square().mean() < 1.5 * (rounded - exact).square().mean()


def test_layers_that_attend_to_others_stay():
    from open_clip.transformer import ResidualAttentionBlock

    layers = nn.Sequential(
        ResidualAttentionBlock(WIDTH, HEADS), ResidualAttentionBlock(WIDTH, HEADS, is_cross_attention=True)
    )
    optimize_layers(layers)
    assert [type(layer.attn).__name__ for layer in layers] == ["MaskedSelfAttention", "MultiheadAttention"]
