"""Rebuilds open_clip models of CLIP's own architecture as ``transformers`` has them, which can be run faster."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

#: What OpenAI's checkpoints have for an end token, by which ``transformers`` looks for the largest token id instead.
_LARGEST = 2


def as_plain_clip(model: Any) -> CLIPModel | None:
    """The same model, with the same weights in the same memory; None where open_clip has added to CLIP's architecture.

    Args:
        model: Of open_clip, in float32.
    """
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import TextTransformer, VisionTransformer

    if not isinstance(model, CLIP | CustomTextCLIP) or not isinstance(model.visual, VisionTransformer):
        return None
    image, text = model.visual, model if isinstance(model, CLIP) else model.text
    if not isinstance(text, CLIP | TextTransformer):
        return None
    image_layers, text_layers = _options_of(image.transformer), _options_of(text.transformer)
    end = _end_token(text)
    if not (image_layers and text_layers and end is not None and _is_plain_image_tower(image)):
        return None
    vision_config = {**image_layers, "image_size": image.image_size[0], "patch_size": image.patch_size[0]}
    text_config = {
        **text_layers,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "eos_token_id": end,
    }
    config = CLIPConfig(vision_config=vision_config, text_config=text_config, projection_dim=image.output_dim)
    return _with_weights(config, dict(_weights(model, image, text)))


def _is_plain_image_tower(tower: Any) -> bool:
    """Whether its features are the first token's, normalised before the layers and after them, and projected."""
    norms = tower.ln_pre, tower.ln_post, tower.transformer.resblocks[0].ln_1
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) > 1:
        return False
    is_square = len({*tower.image_size}) == len({*tower.patch_size}) == 1
    is_projected = tower.proj is not None and tower.conv1.bias is None
    return is_square and is_projected and tower.attn_pool is None and tower.pool_type == "tok"


def _end_token(tower: Any) -> int | None:
    """The token whose features are the caption's, as ``transformers`` has it; None where they are other ones.

    The tower is a text tower, or a model that holds its parts.
    """
    is_causal = tower.attn_mask is not None and getattr(tower, "cls_emb", None) is None
    is_projected = isinstance(tower.text_projection, Tensor) and isinstance(tower.ln_final, nn.LayerNorm)
    if not is_causal or not is_projected or tower.ln_final.eps != tower.transformer.resblocks[0].ln_1.eps:
        return None
    pool = getattr(tower, "text_pool_type", None) or tower.pool_type
    if pool == "argmax":
        return _LARGEST
    end: int | None = getattr(tower, "text_eos_id", None) or getattr(tower, "eos_id", None)
    return end if pool == "eos" and end != _LARGEST else None


def _options_of(transformer: Any) -> dict[str, Any]:
    """The layers as a config of ``transformers`` describes them; nothing where it can't."""
    from open_clip.transformer import ResidualAttentionBlock

    found = set()
    for block in transformer.resblocks:
        if type(block) is not ResidualAttentionBlock or not isinstance(block.ls_1, nn.Identity):
            return {}
        found.add((block.attn.num_heads, *block.mlp.c_fc.weight.shape, _name_of(block.mlp.gelu), block.ln_1.eps))
        if block.ln_2.eps != block.ln_1.eps:
            return {}
    if len(found) != 1:
        return {}
    [(heads, hidden, width, activation, eps)] = found
    if activation is None:
        return {}
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": len(transformer.resblocks),
        "hidden_act": activation,
        "layer_norm_eps": eps,
    }


def _name_of(activation: nn.Module) -> str | None:
    """What ``transformers`` calls an activation."""
    if isinstance(activation, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}.get(activation.approximate)
    return "quick_gelu" if type(activation).__name__ == "QuickGELU" else None


# --- weights ---


def _with_weights(config: CLIPConfig, weights: dict[str, Tensor]) -> CLIPModel:
    with torch.device("meta"):  # to draw random weights would take seconds
        model = CLIPModel(config).eval()
    model.load_state_dict(weights, assign=True, strict=True)
    for embeddings in (model.vision_model.embeddings, model.text_model.embeddings):
        positions = torch.arange(embeddings.position_embedding.num_embeddings, device="cpu")
        embeddings.position_ids = positions.expand(1, -1)
    return model


def _weights(model: Any, image: Any, text: Any) -> Iterator[tuple[str, Tensor]]:
    """Names in ``transformers``, and weights."""
    yield "logit_scale", model.logit_scale.data.reshape(())
    yield "visual_projection.weight", image.proj.data.T
    yield "text_projection.weight", text.text_projection.data.T
    yield "vision_model.embeddings.class_embedding", image.class_embedding.data
    yield "vision_model.embeddings.patch_embedding.weight", image.conv1.weight.data
    yield "vision_model.embeddings.position_embedding.weight", image.positional_embedding.data
    yield "text_model.embeddings.token_embedding.weight", text.token_embedding.weight.data
    yield "text_model.embeddings.position_embedding.weight", text.positional_embedding.data
    yield from _parameters("vision_model.pre_layrnorm", image.ln_pre)
    yield from _parameters("vision_model.post_layernorm", image.ln_post)
    yield from _parameters("text_model.final_layer_norm", text.ln_final)
    for tower, layers in (("vision_model", image.transformer), ("text_model", text.transformer)):
        for number, block in enumerate(layers.resblocks):
            yield from _of_layer(f"{tower}.encoder.layers.{number}", block)


def _of_layer(name: str, block: Any) -> Iterator[tuple[str, Tensor]]:
    yield from _parameters(f"{name}.layer_norm1", block.ln_1)
    yield from _parameters(f"{name}.layer_norm2", block.ln_2)
    yield from _parameters(f"{name}.mlp.fc1", block.mlp.c_fc)
    yield from _parameters(f"{name}.mlp.fc2", block.mlp.c_proj)
    yield from _parameters(f"{name}.self_attn.out_proj", block.attn.out_proj)
    parts = zip("qkv", block.attn.in_proj_weight.data.chunk(3), block.attn.in_proj_bias.data.chunk(3), strict=True)
    for part, weight, bias in parts:
        yield f"{name}.self_attn.{part}_proj.weight", weight
        yield f"{name}.self_attn.{part}_proj.bias", bias


def _parameters(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for part, value in module.named_parameters(recurse=False):
        yield f"{name}.{part}", value.data
