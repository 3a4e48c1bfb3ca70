"""Covers what differs between the releases of ``transformers`` that the package runs with."""

from typing import Any

import transformers
from torch import Tensor
from transformers import BaseImageProcessor

from clipfilter_wds.preprocess.image import Resampler

try:
    from transformers.image_processing_backends import TorchvisionBackend as _ResizesTensors
except ImportError:  # the name before 5.4
    from transformers.image_processing_utils_fast import BaseImageProcessorFast as _ResizesTensors


def _towers(kind: str, *families: str) -> tuple[str, ...]:
    """The modules that hold the layers of a kind of tower, by the names that they have had."""
    return tuple(family + kind + name for family in families for name in ("Model", "Transformer"))


#: Text towers in which tokens attend to themselves and those before them.
CAUSAL_TEXT_TOWERS = _towers("Text", "CLIP", "MetaClip2")
#: Of these the end token is the largest in checkpoints whose config has 2, since that is wrong in OpenAI's.
LARGEST_ENDS_CAPTION = _towers("Text", "CLIP")

#: Of these the embedding is the first token of the last layer.
FIRST_TOKEN_TOWERS = _towers("Vision", "CLIP", "MetaClip2", "AltCLIP", "ChineseCLIP")
#: Of these, the last.
LAST_TOKEN_TOWERS = _towers("Text", "Siglip")
#: Of these, it is made of all.
ALL_TOKENS_TOWERS = _towers("Vision", "Siglip")

#: Where there is one of torch's modules for attention, by the kind of module that has it.
MULTIHEAD_ATTENTION = {
    "ResidualAttentionBlock": "attn",  # of open_clip
    "SiglipMultiheadAttentionPoolingHead": "attention",
}


#: Whether the library computes masks, and loads some weights, in torch's default dtype, as releases before 5.0 do.
USES_DEFAULT_DTYPE = transformers.__version__.startswith("4.")


def embeddings_in(features: Any) -> Tensor:
    """``[N, D]`` of what ``get_image_features`` or ``get_text_features`` gives: a tensor, or since 5.0 an output."""
    embeddings: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return embeddings


def text_embeddings(model: Any, input_ids: Tensor, **mask: Tensor) -> Tensor:
    """int64 ``[N, L]`` -> ``[N, D]``, by ``get_text_features`` where that works."""
    if model.config.model_type == "chinese_clip":  # whose own, in 4.57, projects what a layer gives that is not there
        states = model.text_model(input_ids, **mask).last_hidden_state
        projected: Tensor = model.text_projection(states[:, 0])
        return projected
    return embeddings_in(model.get_text_features(input_ids, **mask))


def resampler_of(processor: BaseImageProcessor) -> Resampler:
    """What an image processor resizes with: before 5.0 Pillow, unless the checkpoint was saved with a fast one."""
    return "torchvision" if isinstance(processor, _ResizesTensors) else "pillow_floor"
