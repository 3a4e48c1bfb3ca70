"""Loads dual encoders of open_clip, as LAION, DataComp and DFN publish them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from clipfilter_wds.models.dual_encoder import DualEncoder, ModelError, ModelSource, Towers
from clipfilter_wds.preprocess.clip import ClipPreprocess
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.preprocess.tokens import CaptionTokenizer, PythonEncoder

if TYPE_CHECKING:
    from open_clip.transform import PreprocessCfg

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")


class OpenClipTowers(Towers):
    """The towers of an open_clip model."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """See :class:`Towers`."""
        features: Tensor = self.model.encode_image(pixels)
        return features

    def text_features(self, input_ids: Tensor) -> Tensor:
        """See :class:`Towers`."""
        features: Tensor = self.model.encode_text(input_ids)
        return features


def load_open_clip(source: ModelSource) -> DualEncoder:
    """Load a model from the hub or a folder, in either case with ``open_clip_config.json`` and safetensors.

    Raises:
        ModelError: When it is not there, has no safetensors weights, or prepares images in a way of its own.
    """
    name = source.name
    try:
        import open_clip
    except ImportError as error:
        raise ModelError(f"{name!r} needs open_clip: pip install 'clipfilter-wds[open_clip]'") from error
    folder = source.place if isinstance(source.place, Path) else _download(source, source.place)
    _check_folder(name, folder)
    where = f"local-dir:{folder}"
    try:
        model = open_clip.create_model(where)
        tokenizer = open_clip.get_tokenizer(where)
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"can't load {name!r}: {' '.join(str(error).split()) or type(error).__name__}") from error
    images = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    widths = [config["model_cfg"][tower].get("width", 0) for tower in ("vision_cfg", "text_cfg")]
    return DualEncoder(
        family="open_clip",
        towers=OpenClipTowers(model),
        preprocess=ClipPreprocess(view=_view_of(name, images), tokenize=_captions_of(name, tokenizer)),
        mean=images.mean,
        std=images.std,
        width=max(widths),
    )


def _download(source: ModelSource, hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [_CONFIG, *_WEIGHTS, "*token*", "vocab*", "merges.txt", "*.model"]
    try:
        return Path(snapshot_download(hub_id, revision=source.revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise source.error(error, folder="open_clip:FOLDER") from error


def _check_folder(name: str, folder: Path) -> None:
    if not (folder / _CONFIG).is_file():
        raise ModelError(f"{name!r} holds no {_CONFIG}, so it is no model of open_clip")
    # open_clip takes one of these before any pickled file.
    if not any((folder / weights).is_file() for weights in _WEIGHTS):
        raise ModelError(
            f"{name!r} holds no {_WEIGHTS[0]}. Pickled weights (open_clip_pytorch_model.bin) can run any code and are "
            f"never loaded; save them again with safetensors.torch.save_file(model.state_dict(), {_WEIGHTS[0]!r})"
        )


def _view_of(name: str, images: "PreprocessCfg") -> ImageView:
    size = (images.size, images.size) if isinstance(images.size, int) else tuple(images.size)
    if images.resize_mode == "squash":
        resize: int | tuple[int, int] = size
    elif images.resize_mode == "shortest" and size[0] == size[1]:
        resize = size[0]
    else:
        raise ModelError(
            f"{name!r} resizes images to {images.size} by {images.resize_mode!r}; "
            "'shortest' to a square and 'squash' are usable"
        )
    return ImageView(resize=resize, crop=size, interpolation=images.interpolation, resampler="pillow")


def _captions_of(name: str, tokenizer: Any) -> CaptionTokenizer:
    """Captions of full length, since open_clip adds the positions of all tokens to any caption's."""
    encode = _IdsOf(tokenizer)
    unusual = [
        option for option in ("reduction_fn", "tokenizer_mode", "strip_sep_token") if getattr(tokenizer, option, None)
    ]
    if unusual or not encode.ends_captions:
        raise ModelError(f"{name!r} tokenizes captions in a way that is not supported ({unusual or 'no end token'})")
    vocabulary = [type(tokenizer).__name__, tokenizer.clean_fn.__name__, encode.vocabulary]
    identity = json.dumps(vocabulary, sort_keys=True).encode()
    return CaptionTokenizer(
        PythonEncoder(encode, max_length=tokenizer.context_length, identity=identity),
        max_length=tokenizer.context_length,
        pad_id=encode.pad_id,
        pads_to_max=True,
    )


class _IdsOf:
    """Caption -> all its token ids, by open_clip's own tokenizer or by one of ``transformers`` that it wraps."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._wrapped = getattr(tokenizer, "tokenizer", None)
        self.pad_id: int = self._wrapped.pad_token_id if self._wrapped else 0

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        vocabulary: dict[str, int] = self._wrapped.get_vocab() if self._wrapped else self._tokenizer.encoder
        return vocabulary

    @property
    def ends_captions(self) -> bool:
        """Whether a caption ends with a special token."""
        special = (self._wrapped or self._tokenizer).all_special_ids
        return self("a")[-1] in special

    def __call__(self, caption: str) -> list[int]:
        tokenizer = self._tokenizer
        if self._wrapped is None:
            return [tokenizer.sot_token_id, *tokenizer.encode(caption), tokenizer.eot_token_id]
        ids: list[int] = self._wrapped(tokenizer.clean_fn(caption), verbose=False)["input_ids"]
        return ids
