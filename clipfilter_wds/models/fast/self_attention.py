"""Lets the tokens of an image or a caption attend to each other, as towers of different libraries call it."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfilter_wds.models.fast.attention import attention, matmul_attention
from clipfilter_wds.models.fast.linear import linear_of


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
        self.qkv_proj, self.out_proj = linear_of(weight, bias), out_proj

    def forward(self, normed: Tensor) -> Tensor:
        """``[N, T, D]`` -> ``[N, T, D]``."""
        queries, keys, values = self._heads(self.qkv_proj(normed), 3)
        return self._project(attention(queries, keys, values, scale=self.scale, is_causal=self.is_causal))

    def of_one_token(self, normed: Tensor, wanted: Tensor | int) -> Tensor:
        """``[N, T, D]`` -> ``[N, D]``, for the wanted token, of all rows or of each, int64 ``[N]``."""
        queries, keys, values = self._heads_of_other(taken(normed, wanted)[:, None], normed)
        if self.is_causal:
            mask = _hidden_behind(wanted, normed).repeat_interleave(self.num_heads, 0)
            attended = matmul_attention(queries, keys, values, scale=self.scale, mask=mask)
        else:
            attended = attention(queries, keys, values, scale=self.scale)
        return self._project(attended)[:, 0]

    def _heads_of_other(self, query: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """``[N, Q, D]`` and what that attends to, ``[N, T, D]`` -> queries, keys, values, ``[N, heads, ...]``."""
        weight, bias, width = self.qkv_proj.weight, self.qkv_proj.bias, query.shape[-1]
        queries = self._heads(functional.linear(query, weight[:width], bias[:width]), 1)
        return *queries, *self._heads(functional.linear(other, weight[width:], bias[width:]), 2)

    def _heads(self, features: Tensor, num_parts: int) -> tuple[Tensor, ...]:
        """``[N, T, num_parts * D]`` -> as many ``[N, heads, T, D / heads]``."""
        parts: Tensor = features.unflatten(-1, (num_parts, self.num_heads, -1))
        return parts.permute(2, 0, 3, 1, 4).unbind()

    def _project(self, attended: Tensor) -> Tensor:
        """``[N, heads, Q, D / heads]`` -> ``[N, Q, D]``."""
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return output


class FastMultiheadAttention(SelfAttention):
    """In place of torch's own, which under autocast on a CPU copies its weights for every image.

    Args:
        usual: Its weights are not asked for.
    """

    def __init__(self, usual: nn.MultiheadAttention) -> None:
        weight, bias = usual.in_proj_weight.data, usual.in_proj_bias.data
        super().__init__(weight, bias, usual.out_proj, num_heads=usual.num_heads)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        need_weights: bool = True,  # as torch has it, and nobody looks at them
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """``[N, Q, D]`` and ``[N, T, D]`` -> ``[N, Q, D]``, and no weights.

        The mask is added: ``[Q, T]`` or ``[N * heads, Q, T]``.
        """
        dtype = self.qkv_proj.weight.dtype
        if key is not value:
            raise ValueError("keys and values must be of the same tokens")
        if query is key:
            queries, keys, values = self._heads(self.qkv_proj(query.to(dtype)), 3)
        else:
            queries, keys, values = self._heads_of_other(query.to(dtype), key.to(dtype))
        mask = None if attn_mask is None else attn_mask.to(dtype)
        return self._project(attention(queries, keys, values, scale=self.scale, mask=mask)), None


def is_replaceable(module: object) -> bool:
    """Whether :class:`FastMultiheadAttention` can do what a module does."""
    if not isinstance(module, nn.MultiheadAttention):
        return False
    return module.batch_first and module._qkv_same_embed_dim and module.in_proj_bias is not None


def taken(features: Tensor, wanted: Tensor | int) -> Tensor:
    """``[N, T, D]`` -> ``[N, D]``: the wanted token, of all rows or of each, int64 ``[N]``."""
    if isinstance(wanted, int):
        return features[:, wanted]
    return features[torch.arange(len(features), device=features.device), wanted]


def _hidden_behind(wanted: Tensor | int, features: Tensor) -> Tensor:
    """Hides from the wanted tokens those behind them: added to the products of keys and queries, ``[N, 1, T]``."""
    places = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
    is_behind = places > (wanted if isinstance(wanted, int) else wanted[:, None])
    return features.new_zeros(is_behind.shape).masked_fill_(is_behind, float("-inf"))[:, None]
