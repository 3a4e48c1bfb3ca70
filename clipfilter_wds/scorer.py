"""Batches -> cosine similarities, with a CLIP model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Resampling
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from clipfilter_wds.captions import CaptionTokenizer, RustEncoder
from clipfilter_wds.preprocess import ClipPreprocess, ImageView

DEFAULT_MODEL = "openai/clip-vit-base-patch32"

#: Models that are part of the package, by the name that stands for their folder.
BUNDLED_MODELS = {"demo-tiny": Path(__file__).parent / "demo" / "tiny_clip"}

Precision = Literal["auto", "fp32"]


class ModelError(ValueError):
    """A model that can't be used; the message says why and what to do."""


class ClipScorer(nn.Module):
    """Scores image-caption pairs by the cosine similarity of their CLIP embeddings.

    The reference is DataFlow-MM's ``ImageClipFilter``: ``CLIPProcessor`` and ``CLIPModel`` in float32, both embeddings
    L2-normalised, dot product.

    Args:
        model: A Hugging Face hub id, a local folder, or ``demo-tiny``, the CLIP of drawn scenes in this package.
        revision: Branch, tag or commit of a hub model.
        device: ``auto`` (CUDA if there is one), or any torch device.
        precision: ``fp32``. ``auto`` means the fastest precision whose decisions equal float32's, at present float32.

    Raises:
        ModelError: When there is no such model, it is no CLIP, has no safetensors weights, or the hub can't be reached.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: str | torch.device = "auto",
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self.model_name = str(model)
        source = str(BUNDLED_MODELS.get(self.model_name, Path(model).expanduser() if _is_folder(model) else model))
        self.model, processor, tokenizer = _load(self.model_name, source, revision)
        self.precision = "fp32" if precision == "auto" else precision
        self.preprocess = _preprocess_of(self.model_name, self.model, processor, tokenizer)
        self._fingerprint = {
            "model": self.model_name,
            "weights": _weights_hash(self.model),
            **self.preprocess.fingerprint,
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "precision": self.precision,
        }
        # The scale and shift that CLIPImageProcessor fuses out of rescale and normalise, for pixels in 0..255.
        self.register_buffer("pixel_mean", _per_channel(processor.image_mean) * (1.0 / processor.rescale_factor))
        self.register_buffer("pixel_std", _per_channel(processor.image_std) * (1.0 / processor.rescale_factor))
        self.requires_grad_(False).eval().to(resolve_device(device))

    @property
    def device(self) -> torch.device:
        """Where scores are computed."""
        return self.pixel_mean.device

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on beside the sample: weights, preprocessing, text handling, precision. JSON-ready."""
        return dict(self._fingerprint)

    @torch.inference_mode()
    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """Cosine similarity of N images with N captions.

        Args:
            pixel_values: uint8 ``[N, 3, H, W]`` as :attr:`preprocess` makes them, on any device.
            input_ids: int64 ``[N, L]`` likewise.

        Returns:
            float32 ``[N]`` in [-1, 1] up to rounding, on :attr:`device`; not clipped.
        """
        if not len(pixel_values):
            return torch.empty(0, device=self.device)
        images = self.encode_image(pixel_values.to(self.device, non_blocking=True))
        texts = self.encode_text(input_ids.to(self.device, non_blocking=True))
        return (images * texts).sum(dim=-1)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """uint8 ``[N, 3, H, W]`` -> L2-normalised float32 ``[N, D]``."""
        pixels = (pixel_values.float() - self.pixel_mean) / self.pixel_std
        return functional.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """int64 ``[N, L]`` -> L2-normalised float32 ``[N, D]``.

        No attention mask: the causal one hides the padding from every token up to the first end of text, where CLIP
        pools, so that padding to the batch's longest caption is exact.
        """
        return functional.normalize(self.model.get_text_features(input_ids).pooler_output, dim=-1)


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device that ``device`` names; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: When it names a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; use auto, cpu, cuda or cuda:1") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return resolved


# --- loading ---


def _is_folder(model: str | Path) -> bool:
    """Whether ``model`` can only mean a folder: it is one, or it is written like a path and not like ``owner/name``."""
    text = str(model)
    return isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).is_dir()


def _load(
    name: str, source: str, revision: str | None
) -> tuple[CLIPModel, CLIPImageProcessor, PreTrainedTokenizerFast]:
    if _is_folder(source):
        _check_folder(Path(source))
    at: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **at)
        if not isinstance(config, CLIPConfig):
            raise ModelError(f"{name!r} is a model of type {config.model_type!r}, not a CLIP")
        model, info = CLIPModel.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **at
        )
        processor = CLIPImageProcessor.from_pretrained(source, **at)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **at)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(_explain(name, source, error)) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ModelError(
            f"{name!r} lacks {len(info['missing_keys'])} of the weights that its config.json asks for "
            f"(such as {next(iter(info['missing_keys'] or info['mismatched_keys']))!r}); its scores would be random"
        )
    return model, processor, tokenizer


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder {str(folder)!r}; give a folder with config.json and model.safetensors, "
            f"a hub id such as {DEFAULT_MODEL!r}, or 'demo-tiny'"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{str(folder)!r} holds no config.json, so it is no Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{str(folder)!r} holds no *.safetensors weights. Pickled weights (pytorch_model.bin) can run any code and "
            "are never loaded; save them again with model.save_pretrained(folder), which writes safetensors"
        )


def _explain(name: str, source: str, error: Exception) -> str:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _is_folder(source):
        return f"can't load {name!r}: {first_line}"
    return (
        f"can't load {name!r} from the Hugging Face hub: {first_line} Check the name and the connection; where "
        f"there is none, give a local folder (made elsewhere with `hf download {name} --local-dir FOLDER`)"
    )


def _preprocess_of(
    name: str, model: CLIPModel, processor: CLIPImageProcessor, tokenizer: PreTrainedTokenizerFast
) -> ClipPreprocess:
    settings = processor.to_dict()
    resize, crop = settings["size"].get("shortest_edge"), settings["crop_size"]
    wanted = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if not resize or max(crop.values()) > resize or not all(settings[step] for step in wanted):
        raise ModelError(f"{name!r} does not resize the shortest edge and centre crop, so its images can't be prepared")
    pad_id = tokenizer.pad_token_id
    max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    return ClipPreprocess(
        view=ImageView(
            resize=resize,
            crop=(crop["height"], crop["width"]),
            interpolation=Resampling(settings["resample"]).name.lower(),
        ),
        tokenize=CaptionTokenizer(
            RustEncoder(tokenizer.backend_tokenizer, max_length=max_length),
            max_length=max_length,
            pad_id=tokenizer.eos_token_id if pad_id is None else pad_id,
        ),
    )


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


def _weights_hash(model: CLIPModel) -> str:
    """SHA-256 over names and values of all weights, whatever files they came in."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().view(torch.uint8).numpy() if value.ndim else value.numpy().tobytes())
    return digest.hexdigest()
