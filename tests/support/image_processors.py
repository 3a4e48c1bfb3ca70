"""Names the image processors of the installed ``transformers``: those that resize tensors, and those of Pillow."""

import inspect
from typing import Any

from PIL import Image
from transformers import image_transforms

try:
    from transformers import CLIPImageProcessor as ClipByTensor
    from transformers import CLIPImageProcessorPil as ClipByPillow
    from transformers import SiglipImageProcessor as SiglipByTensor
    from transformers import SiglipImageProcessorPil as SiglipByPillow
except ImportError:  # the names before 5.4
    from transformers import CLIPImageProcessor as ClipByPillow
    from transformers import CLIPImageProcessorFast as ClipByTensor
    from transformers import SiglipImageProcessor as SiglipByPillow
    from transformers import SiglipImageProcessorFast as SiglipByTensor

__all__ = ["ClipByPillow", "ClipByTensor", "SiglipByPillow", "SiglipByTensor", "as_seen", "options_of"]

_PUTS_ON_WHITE = "alpha_composite" in inspect.getsource(image_transforms.convert_to_rgb)


def as_seen(image: Image.Image) -> Image.Image:
    """An RGB image as the newest release sees it: a transparent colour is white. Older ones show what it hides."""
    if _PUTS_ON_WHITE or image.info.get("transparency") is None:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def options_of(processor: object) -> dict[str, Any]:
    """What to call it with, as it would take an image that is 1 or 3 pixels high for one whose colours come first."""
    return {"input_data_format": "channels_last"} if isinstance(processor, ClipByPillow | SiglipByPillow) else {}
