"""Runs the layers of a transformer of which the features of one token are wanted."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from clipfilter_wds.models.fast.add_norm import add_norm, layer_norm
from clipfilter_wds.models.fast.self_attention import SelfAttention, taken


class Layers(nn.Module):
    """The layers of a tower, of whose last one only what the wanted tokens need is computed.

    Args:
        layers: Those of ``transformers``.
        is_causal: Whether tokens attend to themselves and those before them only.
    """

    def __init__(self, layers: Iterable[Any], *, is_causal: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(layer, is_causal=is_causal) for layer in layers)

    def forward(self, states: Tensor, wanted: Tensor | int) -> Tensor:
        """The features of one token of each row, behind the last layer.

        Args:
            states: float32 ``[N, T, D]``; on a GPU its memory is used again.
            wanted: Which token, of all rows or of each, int64 ``[N]``.

        Returns:
            float32 ``[N, D]``.
        """
        states, normed = self._up_to_last(states)
        last: Any = self.layers[-1]
        output: Tensor = last.of_one_token(states, normed, wanted)
        return output

    def of_all_tokens(self, states: Tensor) -> Tensor:
        """The features of all tokens, float32 ``[N, T, D]``, from the same."""
        states, normed = self._up_to_last(states)
        last: Any = self.layers[-1]
        output: Tensor = last.of_all_tokens(states, normed)
        return output

    def _up_to_last(self, states: Tensor) -> tuple[Tensor, Tensor]:
        layers: list[Any] = list(self.layers)
        normed = layers[0].normalize(states)
        for layer, following in pairwise(layers):
            states, normed = layer(states, normed, following.norm1)
        return states, normed


class _Layer(nn.Module):
    """Attention and an MLP, each behind a norm, and each added to what flows by."""

    def __init__(self, layer: Any, *, is_causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = layer.layer_norm1, layer.layer_norm2, layer.mlp
        self.attention = _attention_of(layer.self_attn, is_causal=is_causal)

    @property
    def _dtype(self) -> torch.dtype:
        return self.attention.qkv_proj.weight.dtype

    def normalize(self, states: Tensor) -> Tensor:
        """What attention takes, of the input of the first layer."""
        return layer_norm(states, self.norm1, self._dtype)

    def forward(self, states: Tensor, normed: Tensor, following: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """What flows by, ``[N, T, D]``, and what this layer's norm has made of it -> the same for the next layer."""
        states, normed = add_norm(states, self.attention(normed), self.norm2, self._dtype)
        return add_norm(states, self.mlp(normed), following, self._dtype)

    def of_all_tokens(self, states: Tensor, normed: Tensor) -> Tensor:
        """The output of the last layer, ``[N, T, D]``."""
        states, normed = add_norm(states, self.attention(normed), self.norm2, self._dtype)
        output: Tensor = states + self.mlp(normed)
        return output

    def of_one_token(self, states: Tensor, normed: Tensor, wanted: Tensor | int) -> Tensor:
        """The output for the wanted tokens alone, ``[N, D]``: a sixth of the work."""
        states = taken(states, wanted) + self.attention.of_one_token(normed, wanted)
        output: Tensor = states + self.mlp(layer_norm(states, self.norm2, self._dtype))
        return output


def _attention_of(usual: Any, *, is_causal: bool) -> SelfAttention:
    parts = usual.q_proj, usual.k_proj, usual.v_proj
    weight, bias = (torch.cat([getattr(part, name).data for part in parts]) for name in ("weight", "bias"))
    return SelfAttention(weight, bias, usual.out_proj, num_heads=usual.num_heads, is_causal=is_causal)
