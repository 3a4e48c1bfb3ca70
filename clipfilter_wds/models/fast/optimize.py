"""Rewrites the layers of a model so that the same embeddings take less work."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from clipfilter_wds.models.fast.layers import Layers
from clipfilter_wds.models.fast.patches import ImageEmbeddings, PatchEmbedding, embeds_patches
from clipfilter_wds.models.fast.self_attention import FastMultiheadAttention, is_replaceable
from clipfilter_wds.models.releases import (
    ALL_TOKENS_TOWERS,
    FIRST_TOKEN_TOWERS,
    LAST_TOKEN_TOWERS,
    MULTIHEAD_ATTENTION,
)


def optimize_layers(towers: nn.Module) -> None:
    """Rewrite the layers of known kinds, in place, before the weights are in low precision.

    Embeddings stay the same up to rounding. The image tower of a ViT-B/32 in bf16, on one core, becomes 1.06 times as
    fast by its last layer, 1.04 by its patches and 1.05 by its attention.
    """
    for name, module in list(towers.named_modules()):
        _fold_quick_gelu(module)
        if isinstance(module, nn.Conv2d) and embeds_patches(module):
            towers.set_submodule(name, PatchEmbedding(module))
        attention = MULTIHEAD_ATTENTION.get(type(module).__name__, "")
        if is_replaceable(getattr(module, attention, None)):
            setattr(module, attention, FastMultiheadAttention(getattr(module, attention)))
        if hasattr(module, "encoder") and not isinstance(module.encoder, _Encoder):
            _optimize_tower(module)


# --- activations ---

#: The activation x * sigmoid(1.702 x) of OpenAI's models, as transformers and open_clip call it.
_QUICK_GELUS = ("QuickGELUActivation", "QuickGELU")
_QUICK_GELU_SCALE = 1.702


def _fold_quick_gelu(block: nn.Module) -> None:
    """Fold the scaling of a QuickGELU into the linear layers around it, which leaves a SiLU.

    x * sigmoid(a x) = SiLU(a x) / a: one step instead of three, a few hundredths of the forward pass.
    """
    children = dict(block.named_children())
    names = [name for name, child in children.items() if type(child).__name__ in _QUICK_GELUS]
    layers = [child for child in children.values() if isinstance(child, nn.Linear)]
    if len(names) != 1 or len(layers) != 2:
        return
    before, after = layers
    before.weight.data *= _QUICK_GELU_SCALE
    before.bias.data *= _QUICK_GELU_SCALE
    after.weight.data /= _QUICK_GELU_SCALE
    block.set_submodule(names[0], nn.SiLU(inplace=True))


# --- transformer layers ---


def _optimize_tower(tower: Any) -> None:
    kind = type(tower).__name__
    if kind in FIRST_TOKEN_TOWERS:
        tower.embeddings, tower.encoder = ImageEmbeddings(tower.embeddings), _Encoder(tower.encoder.layers, wanted=0)
    elif kind in ALL_TOKENS_TOWERS:
        tower.embeddings, tower.encoder = ImageEmbeddings(tower.embeddings), _Encoder(tower.encoder.layers, wanted=None)
    elif kind in LAST_TOKEN_TOWERS:
        tower.encoder = _Encoder(tower.encoder.layers, wanted=-1)


class _Encoder(nn.Module):
    """The layers of a tower in which every token attends to all.

    Args:
        layers: Those of ``transformers``.
        wanted: The token whose features are the tower's output; None for all.
    """

    def __init__(self, layers: Iterable[Any], *, wanted: int | None) -> None:
        super().__init__()
        self.layers, self.wanted = Layers(layers), wanted

    def forward(self, inputs_embeds: Tensor, **_: object) -> BaseModelOutput:
        """``[N, T, D]`` -> ``[N, T, D]``, or ``[N, 1, D]``, in the form that the calling library expects."""
        if self.wanted is None:
            return BaseModelOutput(last_hidden_state=self.layers.of_all_tokens(inputs_embeds))
        return BaseModelOutput(last_hidden_state=self.layers(inputs_embeds, self.wanted)[:, None])
