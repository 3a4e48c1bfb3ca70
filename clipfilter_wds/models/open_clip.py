"""Loads dual encoders of open_clip, as LAION, DataComp and DFN publish them."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clipfilter_wds.models.checkpoint import (
    Checkpoint,
    check_loaded_weights,
    check_tokenizer_files,
    check_vocabulary,
    temperature_of,
)
from clipfilter_wds.models.dual_encoder import DualEncoder, ModelError, ModelSource, Towers
from clipfilter_wds.models.hub import cached_copy
from clipfilter_wds.models.hugging_face import HuggingFaceTowers
from clipfilter_wds.models.naming import OPEN_CLIP, check_folder
from clipfilter_wds.models.plain_clip import as_plain_clip
from clipfilter_wds.models.probe import TokenIds, check_tokenizer
from clipfilter_wds.preprocess.clip import ClipPreprocess
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.preprocess.tokens import CaptionTokenizer, PythonEncoder

if TYPE_CHECKING:
    from open_clip.transform import PreprocessCfg

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_PICKLED = (".bin", ".pt", ".pth")
_POSITIONS = "positional_embedding"


class PlainTowers(HuggingFaceTowers):
    """Those of CLIP's own architecture.

    Args:
        model: As ``transformers`` has it.
        weights_hash: Of the model as open_clip has it.
    """

    def __init__(self, model: nn.Module, weights_hash: str) -> None:
        super().__init__(model, pad_id=None)
        self._weights_hash = weights_hash

    def weights_hash(self) -> str:
        """See :class:`Towers`."""
        return self._weights_hash


class OpenClipTowers(Towers):
    """The towers of any other open_clip model."""

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
        ModelError: When it is not there, it lacks a part, or it prepares images in a way of its own.
    """
    name = source.name
    try:
        import open_clip
    except ImportError as error:
        raise ModelError(f"{name!r} needs open_clip: pip install 'clipfilter-wds[open-clip]'") from error
    source = cached_copy(source, _check_files, [])
    folder = source.place if isinstance(source.place, Path) else _download(source, source.place)
    checkpoint = Checkpoint(source)
    if isinstance(source.place, Path) and not checkpoint.has(_CONFIG):
        check_folder(folder, OPEN_CLIP)
    _check_files(checkpoint)
    config = checkpoint.read(_CONFIG)
    where = f"local-dir:{folder}"
    try:
        model, temperature = _load_towers(source, folder)
        tokenizer = open_clip.get_tokenizer(where)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"can't load {name!r}: {' '.join(str(error).split()) or type(error).__name__}") from error
    if wrapped := getattr(tokenizer, "tokenizer", None):
        check_vocabulary(checkpoint, wrapped.vocab_files_names)
    images = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    towers: Towers = OpenClipTowers(model)
    plain = as_plain_clip(model)
    if plain is not None:
        towers = PlainTowers(plain, towers.weights_hash())
    widths = [config["model_cfg"][tower].get("width", 0) for tower in ("vision_cfg", "text_cfg")]
    return DualEncoder(
        family="open_clip",
        towers=towers,
        preprocess=ClipPreprocess(
            view=_view_of(name, images),
            tokenize=_captions_of(name, tokenizer, model, pads_to_max=plain is None),
        ),
        mean=images.mean,
        std=images.std,
        width=max(widths),
        temperature=temperature,
    )


def _load_towers(source: ModelSource, folder: Path) -> tuple[Any, float | None]:
    """The model with its weights, and its temperature.

    open_clip's own way to load resizes position embeddings, and asks for ``logit_scale``.
    """
    import open_clip

    root = logging.getLogger()
    root.addFilter(_is_no_false_alarm)
    try:
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).float()
    finally:
        root.removeFilter(_is_no_false_alarm)
    file = next(file for file in _WEIGHTS if (folder / file).is_file())
    with safe_open(folder / file, "pt") as weights:
        shapes = {name.removeprefix("module."): weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    if "logit_bias" not in shapes:
        model.logit_bias = None  # open_clip would make one as wide as logit_scale, which may be missing
    positions = {name: list(value.shape) for name, value in model.state_dict().items() if name.endswith(_POSITIONS)}
    reshaped = [name for name, shape in positions.items() if shapes.get(name, shape) != shape]
    check_loaded_weights(source, file, [], reshaped)
    differences = open_clip.load_checkpoint(model, str(folder / file), strict=False)
    check_loaded_weights(source, file, differences.missing_keys, [])
    if differences.unexpected_keys:
        raise ModelError(
            f"can't load {source.name!r}: {file} holds {len(differences.unexpected_keys)} weights that {_CONFIG} knows "
            f"nothing of (such as {min(differences.unexpected_keys)!r}); take both from one checkpoint"
        )
    return model, temperature_of(model, differences.missing_keys)


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Weights are loaded after the model was made, which open_clip warns of."""
    return "initialized randomly" not in record.getMessage()


def _download(source: ModelSource, hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [_CONFIG, *_WEIGHTS, "*token*", "vocab*", "merges.txt", "*.model"]
    try:
        return Path(snapshot_download(hub_id, revision=source.revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise source.error(error, folder="open_clip:FOLDER") from error


def _check_files(checkpoint: Checkpoint) -> None:
    name, config = checkpoint.source.name, checkpoint.read(_CONFIG)
    if not config:
        raise ModelError(f"{name!r} holds no {_CONFIG}, so it is no model of open_clip")
    # open_clip itself would take OpenAI's.
    absent = [setting for setting in ("mean", "std") if not (config.get("preprocess_cfg") or {}).get(setting)]
    if absent:
        raise ModelError(
            f"{_CONFIG} of {name!r} gives no {' and no '.join(absent)} in preprocess_cfg, so its images can't be "
            "prepared as in its training; add what the model was trained with"
        )
    if config.get("model_cfg", {}).get("text_cfg", {}).get("hf_tokenizer_name"):
        check_tokenizer_files(checkpoint)
    if not any(map(checkpoint.has, _WEIGHTS)):
        place = checkpoint.source.place
        if isinstance(place, Path) and not any(path.suffix in _PICKLED for path in place.iterdir()):
            raise checkpoint.lacks(_WEIGHTS[0], "its weights")
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


def _captions_of(name: str, tokenizer: Any, model: nn.Module, *, pads_to_max: bool) -> CaptionTokenizer:
    """Captions, of full length where open_clip computes them, since it adds all positions to any caption."""
    encode = _IdsOf(tokenizer)
    unusual = [
        option for option in ("reduction_fn", "tokenizer_mode", "strip_sep_token") if getattr(tokenizer, option, None)
    ]
    if unusual:
        raise ModelError(f"{name!r} tokenizes captions in a way that is not supported ({unusual})")
    vocabulary = [type(tokenizer).__name__, tokenizer.clean_fn.__name__, encode.vocabulary]
    identity = json.dumps(vocabulary, sort_keys=True).encode()
    limit = tokenizer.context_length
    encoder = PythonEncoder(encode, max_length=limit, identity=identity)
    text = getattr(model, "text", model)
    embeddings = [module.num_embeddings for module in text.modules() if isinstance(module, nn.Embedding)]
    ids = TokenIds(
        vocabulary=encode.vocabulary.values(),
        num_embeddings=max(embeddings, default=0),
        special=encode.special_ids,
        unknown=encode.unknown_id,
    )
    check_tokenizer(name, encoder, ids)
    return CaptionTokenizer(encoder, max_length=limit, pad_id=encode.pad_id, pads_to_max=pads_to_max)


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
    def special_ids(self) -> list[int]:
        """Those of start, end and padding."""
        ids: list[int] = (self._wrapped or self._tokenizer).all_special_ids
        return ids

    @property
    def unknown_id(self) -> int | None:
        """The id in place of what the vocabulary can't express, if there is one."""
        unknown: int | None = self._wrapped.unk_token_id if self._wrapped else None
        return unknown

    def __call__(self, caption: str) -> list[int]:
        tokenizer = self._tokenizer
        if self._wrapped is None:
            return [tokenizer.sot_token_id, *tokenizer.encode(caption), tokenizer.eot_token_id]
        ids: list[int] = self._wrapped(tokenizer.clean_fn(caption), verbose=False)["input_ids"]
        return ids
