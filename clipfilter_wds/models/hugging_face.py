"""Loads dual encoders of ``transformers``: CLIP and its relatives."""

import json
import operator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL.Image import Resampling
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from clipfilter_wds.models.checkpoint import (
    Checkpoint,
    check_image_settings,
    check_loaded_weights,
    check_tokenizer_files,
    check_towers,
    check_vocabulary,
    check_weights,
    temperature_of,
)
from clipfilter_wds.models.dual_encoder import DualEncoder, ModelError, ModelSource, Towers
from clipfilter_wds.models.hub import cached_copy
from clipfilter_wds.models.naming import check_folder
from clipfilter_wds.models.probe import TokenIds, check_tokenizer
from clipfilter_wds.models.releases import USES_DEFAULT_DTYPE, embeddings_in, resampler_of, text_embeddings
from clipfilter_wds.preprocess.clip import ClipPreprocess
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.preprocess.tokens import CaptionTokenizer, Encoder, PythonEncoder, RustEncoder, last_places


@dataclass(frozen=True)
class _Family:
    """What differs in the text tower; images are prepared as each checkpoint's own image processor says.

    Attributes:
        masks: Whether padding is hidden by an attention mask. (CLIP hides it by the causal mask.)
        pads_to_max: Whether padding is seen, so that every caption needs the length that the tower was trained on.
        reserved: Positions that no token of a caption can have.
        pools_at_end: Whether a caption's features are those at its end token.
    """

    masks: bool = False
    pads_to_max: bool = False
    reserved: int = 0
    pools_at_end: bool = False


#: By ``model_type``, which of a SigLIP 2 of fixed resolution is ``siglip``.
_FAMILIES = {
    "clip": _Family(pools_at_end=True),
    "metaclip_2": _Family(pools_at_end=True),
    "altclip": _Family(masks=True, reserved=2),  # RoBERTa counts from after its padding token
    "chinese_clip": _Family(masks=True),
    "siglip": _Family(pads_to_max=True),
}

#: Files that the library prefers to others, which would do without them.
_REPLACEABLE = ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors")


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
        return embeddings_in(self.model.get_image_features(pixels))

    def text_features(self, input_ids: Tensor) -> Tensor:
        """See :class:`Towers`."""
        _check_default_dtype()
        mask = {}
        if self._pad_id is not None:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            mask["attention_mask"] = (places < last_places(input_ids, self._pad_id)[:, None]).long()
        return text_embeddings(self.model, input_ids, **mask)


def load_hugging_face(source: ModelSource) -> DualEncoder:
    """Load a model from the hub or a folder.

    Raises:
        ModelError: When there is none, it is no dual encoder, it lacks a part, or the hub can't be reached.
    """
    _check_default_dtype()
    source = cached_copy(source, _check_files, _REPLACEABLE)
    name, place = source.name, source.place
    if isinstance(place, Path):
        _check_folder(place)
    checkpoint = Checkpoint(source)
    at: dict[str, Any] = {"revision": source.revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(place, **at)
        family = _family_of(name, config)
        _check_files(checkpoint)
        model, info = AutoModel.from_pretrained(
            place, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **at
        )  # fmt: skip
        processor = AutoImageProcessor.from_pretrained(place, **at)
        tokenizer = _load_tokenizer(checkpoint, at)
    except ModelError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise source.error(error) from error
    reshaped = [weight for weight, *_ in info["mismatched_keys"]]
    check_loaded_weights(source, "model.safetensors", info["missing_keys"], reshaped)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return DualEncoder(
        family=config.model_type,
        towers=HuggingFaceTowers(model.float(), pad_id=pad_id if family.masks else None),
        preprocess=ClipPreprocess(
            view=_view_of(name, processor, config), tokenize=_captions_of(name, tokenizer, pad_id, config, family)
        ),
        mean=processor.image_mean,
        std=processor.image_std,
        rescale=processor.rescale_factor,
        width=max(config.vision_config.hidden_size, config.text_config.hidden_size),
        temperature=temperature_of(model, info["missing_keys"]),
    )


def _check_default_dtype() -> None:
    dtype = torch.get_default_dtype()
    if USES_DEFAULT_DTYPE and dtype.itemsize < torch.float32.itemsize:
        raise ModelError(
            f"transformers {transformers.__version__} computes in torch's default dtype, which is {dtype} here, so "
            "scores would not be float32's: pip install -U 'transformers>=5', or call "
            "torch.set_default_dtype(torch.float32)"
        )


def _check_files(checkpoint: Checkpoint) -> None:
    check_towers(checkpoint)
    check_weights(checkpoint)
    check_image_settings(checkpoint)
    check_tokenizer_files(checkpoint)


def _load_tokenizer(checkpoint: Checkpoint, at: dict[str, Any]) -> PreTrainedTokenizerBase:
    name = checkpoint.source.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.source.place, **at)
    except Exception as error:  # files that don't fit each other raise anything
        if find_spec("sentencepiece") is None and "sentencepiece" in str(error).lower():
            needed = f"the tokenizer of {name!r} needs sentencepiece: pip install 'clipfilter-wds[siglip]'"
            raise ModelError(needed) from error
        raise checkpoint.unusable_tokenizer(error) from error
    check_vocabulary(checkpoint, tokenizer.vocab_files_names)
    return tokenizer


def _family_of(name: str, config: PretrainedConfig) -> _Family:
    if config.model_type not in _FAMILIES:
        hint = " (SigLIP 2 of variable resolution, NaFlex, is not)" if config.model_type == "siglip2" else ""
        raise ModelError(
            f"{name!r} is a model of type {config.model_type!r}, not a CLIP; usable are {', '.join(_FAMILIES)}{hint}"
        )
    return _FAMILIES[config.model_type]


def _view_of(name: str, processor: BaseImageProcessor, config: PretrainedConfig) -> ImageView:
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
    taken = config.vision_config.image_size
    if crop != (tuple(taken) if isinstance(taken, list | tuple) else (taken, taken)):
        raise ModelError(
            f"preprocessor_config.json of {name!r} makes images of {crop[0]} x {crop[1]} pixels, and config.json asks "
            f"for {taken}; take both from one checkpoint"
        )
    return ImageView(
        resize=resize,
        crop=crop,
        interpolation=Resampling(settings["resample"]).name.lower(),
        resampler=resampler_of(processor),
    )


def _captions_of(
    name: str, tokenizer: PreTrainedTokenizerBase, pad_id: int, config: PretrainedConfig, family: _Family
) -> CaptionTokenizer:
    if tokenizer.padding_side != "right":
        raise ModelError(f"the tokenizer of {name!r} pads on the {tokenizer.padding_side}; the right is expected")
    if pad_id is None:
        raise ModelError(f"the tokenizer_config.json of {name!r} names neither pad_token nor eos_token")
    max_length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings - family.reserved)
    encode: Encoder
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        encode = RustEncoder(backend, max_length=max_length)
    else:
        vocabulary = [type(tokenizer).__name__, getattr(tokenizer, "do_lower_case", None), tokenizer.get_vocab()]
        identity = json.dumps(vocabulary, sort_keys=True).encode()
        encode = PythonEncoder(_IdsOf(tokenizer), max_length=max_length, identity=identity)
    check_tokenizer(name, encode, _ids_of(tokenizer, config, family))
    return CaptionTokenizer(encode, max_length=max_length, pad_id=pad_id, pads_to_max=family.pads_to_max)


def _ids_of(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, family: _Family) -> TokenIds:
    eos_id = config.text_config.eos_token_id
    # In configs older than the library's rule the id is 2, and CLIP takes the largest.
    takes_largest = eos_id == 2 and config.model_type == "clip"
    end = max if takes_largest else lambda _: eos_id
    return TokenIds(
        vocabulary=tokenizer.get_vocab().values(),
        num_embeddings=config.text_config.vocab_size,
        special=tokenizer.all_special_ids,
        unknown=tokenizer.unk_token_id,
        end=end if family.pools_at_end else None,
    )


class _IdsOf:
    """Caption -> token ids, by a tokenizer written in Python."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, caption: str) -> list[int]:
        ids: list[int] = self._tokenizer(caption, verbose=False)["input_ids"]
        return ids


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        check_folder(folder)
        hint = ""
        if (folder / "open_clip_config.json").exists():
            hint = f"; for a model of open_clip write open_clip:{folder}"
        raise ModelError(f"{str(folder)!r} holds no config.json, so it is no Hugging Face model folder{hint}")
