"""Covers what differs between the releases of ``transformers`` that the package runs with."""

from typing import Any

from torch import Tensor
from transformers import BaseImageProcessor

from clipfilter_wds.preprocess.image import Resampler

try:
    from transformers.image_processing_backends import TorchvisionBackend as _ResizesTensors
except ImportError:  # the name before 5.4
    from transformers.image_processing_utils_fast import BaseImageProcessorFast as _ResizesTensors

#: The modules that hold CLIP's layers, by the names that they have had.
CLIP_TEXT_TOWERS = ("CLIPTextModel", "CLIPTextTransformer")
#: Of these the embedding is the first token of the last layer.
FIRST_TOKEN_IMAGE_TOWERS = tuple(
    family + kind
    for family in ("CLIPVision", "AltCLIPVision", "ChineseCLIPVision")
    for kind in ("Model", "Transformer")
)


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
