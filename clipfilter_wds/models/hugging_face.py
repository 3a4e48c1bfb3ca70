"""Loads dual encoders of ``transformers``: CLIP and its relatives."""

import json
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from clipfilter_wds.models.dual_encoder import DualEncoder, ModelError, ModelSource, Towers
from clipfilter_wds.preprocess.clip import ClipPreprocess
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.preprocess.tokens import CaptionTokenizer, Encoder, PythonEncoder, RustEncoder, last_places

_EXAMPLE = "openai/clip-vit-base-patch32"


@dataclass(frozen=True)
class _Family:
    """What differs in the text tower; images are prepared as each checkpoint's own image processor says.

    Attributes:
        masks: Whether padding is hidden by an attention mask. (CLIP hides it by the causal mask.)
        pads_to_max: Whether padding is seen, so that every caption needs the length that the tower was trained on.
        reserved: Positions that no token of a caption can have.
    """

    masks: bool = False
    pads_to_max: bool = False
    reserved: int = 0


#: By ``model_type``, which of a SigLIP 2 of fixed resolution is ``siglip``.
_FAMILIES = {
    "clip": _Family(),
    "altclip": _Family(masks=True, reserved=2),  # RoBERTa counts from after its padding token
    "chinese_clip": _Family(masks=True),
    "siglip": _Family(pads_to_max=True),
}


class HuggingFaceTowers(Towers):
    """The towers of a ``transformers`` model.

    Args:
        model: Has ``get_image_features`` and ``get_text_features``.
        pad_id: The token behind captions that an attention mask must hide; None where none must be hidden.
    """

    def __init__(self, model: nn.Module, *, pad_id: int | None) -> None:
        super().__init__(model)
        self._pad_id = pad_id

    def image_features(self, pixels: Tensor) -> Tensor:
        """See :class:`Towers`."""
        features: Tensor = self.model.get_image_features(pixels).pooler_output
        return features

    def text_features(self, input_ids: Tensor) -> Tensor:
        """See :class:`Towers`."""
        mask = {}
        if self._pad_id is not None:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            mask["attention_mask"] = (places < last_places(input_ids, self._pad_id)[:, None]).long()
        features: Tensor = self.model.get_text_features(input_ids, **mask).pooler_output
        return features


def load_hugging_face(source: ModelSource) -> DualEncoder:
    """Load a model from the hub or a folder.

    Raises:
        ModelError: When there is none, it is no dual encoder, has no safetensors weights, or the hub can't be reached.
    """
    name, place = source.name, source.place
    if isinstance(place, Path):
        _check_folder(place)
    at: dict[str, Any] = {"revision": source.revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(place, **at)
        family = _family_of(name, config)
        model, info = AutoModel.from_pretrained(
            place, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **at
        )
        processor = AutoImageProcessor.from_pretrained(place, **at)
        tokenizer = AutoTokenizer.from_pretrained(place, **at)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if "sentencepiece" in str(error).lower():
            needed = f"the tokenizer of {name!r} needs sentencepiece: pip install 'clipfilter-wds[siglip]'"
            raise ModelError(needed) from error
        raise source.error(error) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ModelError(
            f"{name!r} lacks {len(info['missing_keys'])} of the weights that its config.json asks for "
            f"(such as {next(iter(info['missing_keys'] or info['mismatched_keys']))!r}); its scores would be random"
        )
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return DualEncoder(
        family=config.model_type,
        towers=HuggingFaceTowers(model, pad_id=pad_id if family.masks else None),
        preprocess=ClipPreprocess(
            view=_view_of(name, processor), tokenize=_captions_of(name, tokenizer, pad_id, config, family)
        ),
        mean=processor.image_mean,
        std=processor.image_std,
        rescale=processor.rescale_factor,
        width=max(config.vision_config.hidden_size, config.text_config.hidden_size),
    )


def _family_of(name: str, config: PreTrainedConfig) -> _Family:
    if config.model_type not in _FAMILIES:
        hint = " (SigLIP 2 of variable resolution, NaFlex, is not)" if config.model_type == "siglip2" else ""
        raise ModelError(
            f"{name!r} is a model of type {config.model_type!r}, not a CLIP; usable are {', '.join(_FAMILIES)}{hint}"
        )
    return _FAMILIES[config.model_type]


def _view_of(name: str, processor: BaseImageProcessor) -> ImageView:
    """How the checkpoint's own image processor prepares images."""
    settings = processor.to_dict()
    size = settings["size"]
    exact = (size["height"], size["width"]) if "height" in size else None
    resize = exact or size.get("shortest_edge")
    crop = settings["crop_size"] if settings.get("do_center_crop") else size
    crop = (crop.get("height"), crop.get("width"))
    wanted = ("do_resize", "do_rescale", "do_normalize")
    fits = resize and None not in crop and all(map(operator.le, crop, exact or 2 * (resize,)))
    if not fits or not all(settings[step] for step in wanted):
        raise ModelError(
            f"{name!r} neither resizes the shortest edge and crops the centre, nor resizes to a height and width; "
            "its images can't be prepared"
        )
    return ImageView(resize=resize, crop=crop, interpolation=Resampling(settings["resample"]).name.lower())


def _captions_of(
    name: str, tokenizer: PreTrainedTokenizerBase, pad_id: int, config: PreTrainedConfig, family: _Family
) -> CaptionTokenizer:
    if tokenizer.padding_side != "right":
        raise ModelError(f"the tokenizer of {name!r} pads on the {tokenizer.padding_side}; the right is expected")
    max_length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings - family.reserved)
    encode: Encoder
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        encode = RustEncoder(backend, max_length=max_length)
    else:
        vocabulary = [type(tokenizer).__name__, getattr(tokenizer, "do_lower_case", None), tokenizer.get_vocab()]
        identity = json.dumps(vocabulary, sort_keys=True).encode()
        encode = PythonEncoder(_IdsOf(tokenizer), max_length=max_length, identity=identity)
    return CaptionTokenizer(encode, max_length=max_length, pad_id=pad_id, pads_to_max=family.pads_to_max)


class _IdsOf:
    """Caption -> token ids, by a tokenizer written in Python."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, caption: str) -> list[int]:
        ids: list[int] = self._tokenizer(caption, verbose=False)["input_ids"]
        return ids


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder {str(folder)!r}; give a folder with config.json and model.safetensors, "
            f"a hub id such as {_EXAMPLE!r}, or 'demo-tiny'"
        )
    if not (folder / "config.json").is_file():
        hint = (
            f"; for a model of open_clip write open_clip:{folder}"
            if (folder / "open_clip_config.json").exists()
            else ""
        )
        raise ModelError(f"{str(folder)!r} holds no config.json, so it is no Hugging Face model folder{hint}")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{str(folder)!r} holds no *.safetensors weights. Pickled weights (pytorch_model.bin) can run any code and "
            "are never loaded; save them again with model.save_pretrained(folder), which writes safetensors"
        )
