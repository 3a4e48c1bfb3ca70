"""Lets the tokens of an image or a caption attend to each other, as towers of different libraries call it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfilter_wds.models.fast.attention import attention, matmul_attention


class SelfAttention(nn.Module):
    """Attention whose three projections are one matrix product: on a CPU in bf16 5 to 10 % less for the three.

    Args:
        weight: Of queries, keys and values, ``[3 * D, D]``.
        bias: Likewise, ``[3 * D]``.
        out_proj: What the heads' outputs go through.
        num_heads: Among which D is shared.
        is_causal: Whether tokens attend to themselves and those before them only.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, out_proj: nn.Module, *, num_heads: int, is_causal: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.is_causal, width = num_heads, is_causal, weight.shape[1]
        self.scale = (width // num_heads) ** -0.5
        self.qkv_proj = nn.Linear(width, 3 * width, device=weight.device)
        self.qkv_proj.weight.data, self.qkv_proj.bias.data = weight, bias
        self.out_proj = out_proj

    def forward(self, normed: Tensor) -> Tensor:
        """``[N, T, D]`` -> ``[N, T, D]``."""
        queries, keys, values = self._heads(self.qkv_proj(normed), 3)
        return self._project(attention(queries, keys, values, scale=self.scale, is_causal=self.is_causal))

    def of_one_token(self, normed: Tensor, wanted: Tensor | None) -> Tensor:
        """``[N, T, D]`` -> ``[N, D]``, for the wanted token of each row, int64 ``[N]`` (None: the first)."""
        weight, bias, width = self.qkv_proj.weight, self.qkv_proj.bias, normed.shape[-1]
        [queries] = self._heads(functional.linear(taken(normed, wanted)[:, None], weight[:width], bias[:width]), 1)
        keys, values = self._heads(functional.linear(normed, weight[width:], bias[width:]), 2)
        if self.is_causal and wanted is not None:
            mask = _hidden_behind(wanted, normed).repeat_interleave(self.num_heads, 0)
            attended = matmul_attention(queries, keys, values, scale=self.scale, mask=mask)
        else:
            attended = attention(queries, keys, values, scale=self.scale)
        return self._project(attended)[:, 0]

    def _heads(self, features: Tensor, num_parts: int) -> tuple[Tensor, ...]:
        """``[N, T, num_parts * D]`` -> as many ``[N, heads, T, D / heads]``."""
        parts: Tensor = features.unflatten(-1, (num_parts, self.num_heads, -1))
        return parts.permute(2, 0, 3, 1, 4).unbind()

    def _project(self, attended: Tensor) -> Tensor:
        """``[N, heads, Q, D / heads]`` -> ``[N, Q, D]``."""
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return output


class MaskedSelfAttention(SelfAttention):
    """In place of ``torch.nn.MultiheadAttention``, which for autocast on a CPU copies its weights for every image.

    Args:
        usual: That of a layer in which tokens attend to each other.
    """

    def __init__(self, usual: nn.MultiheadAttention) -> None:
        weight, bias = usual.in_proj_weight.data, usual.in_proj_bias.data
        super().__init__(weight, bias, usual.out_proj, num_heads=usual.num_heads)

    def forward(self, query: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """``[N, T, D]`` and a mask that is added, ``[T, T]`` or ``[N * heads, T, T]`` -> ``[N, T, D]``, no weights."""
        queries, keys, values = self._heads(self.qkv_proj(query.to(self.qkv_proj.weight.dtype)), 3)
        if attn_mask is None:
            return self._project(attention(queries, keys, values, scale=self.scale)), None
        mask = attn_mask.to(queries.dtype)
        return self._project(matmul_attention(queries, keys, values, scale=self.scale, mask=mask)), None


def takes_masked_attention(layer: nn.Module) -> bool:
    """Whether a layer is one of open_clip's in which tokens attend to each other."""
    attention = getattr(layer, "attn", None)
    is_usual = type(layer).__name__ == "ResidualAttentionBlock" and not hasattr(layer, "ln_1_kv")
    return is_usual and isinstance(attention, nn.MultiheadAttention) and attention.batch_first


def taken(features: Tensor, wanted: Tensor | None) -> Tensor:
    """``[N, T, D]`` -> ``[N, D]``, of each row the wanted token, int64 ``[N]`` (None: the first)."""
    if wanted is None:
        return features[:, 0]
    return features[torch.arange(len(features), device=features.device), wanted]


def _hidden_behind(wanted: Tensor, features: Tensor) -> Tensor:
    """Hides from the wanted tokens those behind them: added to the products of keys and queries, ``[N, 1, T]``."""
    is_behind = torch.arange(features.shape[1], device=features.device) > wanted[:, None]
    return features.new_zeros(is_behind.shape).masked_fill_(is_behind, float("-inf"))[:, None]
