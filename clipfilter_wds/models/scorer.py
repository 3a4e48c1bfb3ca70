"""Batches -> cosine similarities, with a CLIP model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfilter_wds.models.config import DEFAULT_MODEL, ScorerConfig
from clipfilter_wds.models.dual_encoder import Towers
from clipfilter_wds.models.fast.image_tower import take_shortcuts
from clipfilter_wds.models.fast.onednn import onednn_products
from clipfilter_wds.models.fast.text_tower import pack_captions
from clipfilter_wds.models.forward_pool import raise_if_cancelled
from clipfilter_wds.models.loading import load_model
from clipfilter_wds.models.precision import DTYPES, NARROW, low_precision, resolve_device, resolve_precision
from clipfilter_wds.preprocess.tokens import NO_CAPTION

#: Float32 batches are filled up to a multiple of so many rows, and those of wide models on a processor cut into such
#: pieces (as fast, and less memory), the others into the larger ones. Kernels are chosen by shape: so a sample's score
#: in float32 does not hang on which samples, or how many, it is scored with.
_FP32_ROWS, _MOST_FP32_ROWS = 8, 64

#: Likewise a caption is filled up to a multiple of so many tokens, and scored with others of that length.
_FP32_TOKENS = 32

#: Images of a low-precision batch that are encoded together. The activations of more than about 40 at ViT-B/32 are over
#: 32 MB each, which glibc gives back to the system after every layer and has to clear again (a tenth of the time).
_IMAGE_GROUP = {"cpu": 32}

#: Captions of a low-precision batch that are encoded together, in order of length: fewer pad less and cost more calls.
_CAPTION_GROUP = {"cpu": 16, "cuda": 256}

#: Likewise where no padding is computed.
_PACKED_GROUP = 64


class ClipScorer(nn.Module):
    """Scores image-caption pairs by the cosine similarity of their CLIP embeddings.

    The reference is DataFlow-MM's ``ImageClipFilter``: ``CLIPProcessor`` and ``CLIPModel`` in float32, both embeddings
    L2-normalised, dot product.

    Args:
        model: A hub id, a local folder or ``demo-tiny``; see :class:`ScorerConfig`.
        options: The other attributes of :class:`ScorerConfig`.

    Raises:
        ModelError: When there is no such model, it is none of these, has no safetensors weights, or the hub can't be
            reached.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: str | Path = DEFAULT_MODEL, **options: Any) -> None:
        super().__init__()
        config = ScorerConfig(model=model, **options)
        self.model_name = str(config.model)
        self.reduce, self.flip = config.reduce, config.flip
        encoder = load_model(config.model, config.revision)
        self.model = encoder.towers
        on_device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, on_device, encoder.width)
        self.preprocess = encoder.preprocess.with_view(fast_decode=config.fast_decode)
        self._fingerprint = {
            "model": self.model_name,
            "family": encoder.family,
            "weights": self.model.weights_hash(),
            **self.preprocess.fingerprint,
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "precision": self.precision,
            "reduce": config.reduce,
            "flip": config.flip,
        }
        # The scale and shift that CLIPImageProcessor fuses out of rescale and normalise, for pixels in 0..255.
        self.register_buffer("pixel_mean", _per_channel(encoder.mean) * (1.0 / encoder.rescale))
        self.register_buffer("pixel_std", _per_channel(encoder.std) * (1.0 / encoder.rescale))
        self.width = encoder.width  # of the wider tower
        is_wide_on_cpu = on_device.type == "cpu" and encoder.width >= NARROW
        self.fp32_rows = _FP32_ROWS if is_wide_on_cpu else _MOST_FP32_ROWS
        if is_wide_on_cpu:
            take_shortcuts(self.model)
        if config.compile and self.is_exact:
            raise ValueError("compile is for low precision, and precision is fp32 here: leave compile out")
        self.fast_model = self.model if self.is_exact else low_precision(self.model, self.precision)
        packs = on_device.type == "cpu" and not self.is_exact and pack_captions(self.fast_model)
        self._caption_group = _PACKED_GROUP if packs else _CAPTION_GROUP.get(on_device.type, 256)
        if config.compile:
            # With as many threads as the calling thread has, and not as the one had that it was compiled in.
            self.fast_model.compile(with_text=not packs, dynamic=True, options={"cpp.dynamic_threads": True})
        self.requires_grad_(False).eval().to(on_device)

    @property
    def device(self) -> torch.device:
        """Where scores are computed."""
        return self.pixel_mean.device

    @property
    def is_exact(self) -> bool:
        """Whether :meth:`forward` itself computes in float32."""
        return self.precision == "fp32"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on beside the sample: weights, preprocessing, text handling, precision. JSON-ready."""
        return dict(self._fingerprint)

    @torch.inference_mode()
    def forward(self, pixel_values: Tensor, input_ids: Tensor, *, image_embeds: Tensor | None = None) -> Tensor:
        """Cosine similarity of N images with their captions, in :attr:`precision`.

        Args:
            pixel_values: uint8 ``[N, 3, H, W]`` as :attr:`preprocess` makes them, on any device.
            input_ids: int64 ``[N, L]`` likewise; or ``[N, K, L]`` for up to K captions per image, of whose similarities
                the result is the largest, mean or smallest.
            image_embeds: What :meth:`encode_image` makes of the images, where that has been done.

        Returns:
            float32 ``[N]`` in [-1, 1] up to rounding, on :attr:`device`; not clipped.
        """
        if not len(pixel_values):
            return torch.empty(0, device=self.device)
        if image_embeds is None:
            image_embeds = self.encode_image(pixel_values)
        return self._cosine(image_embeds, self.encode_text(_captions(input_ids)), input_ids)

    @torch.inference_mode()
    def score_fp32(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """As :meth:`forward`, in float32 whatever :attr:`precision` is: the reference that decides near a threshold."""
        if not len(pixel_values):
            return torch.empty(0, device=self.device)
        captions = self.encode_text_fp32(_captions(input_ids))
        return self._cosine(self.encode_image_fp32(pixel_values), captions, input_ids)

    @torch.inference_mode()
    def encode_captions_fp32(self, input_ids: Tensor) -> Sequence[Tensor]:
        """Of each of N images its captions, L2-normalised float32 ``[K, D]``, in float32; ``[1, D]`` of ``[N, L]``."""
        num_captions = _is_caption(input_ids).view(len(input_ids), -1).sum(dim=1)
        embeds: Sequence[Tensor] = self.encode_text_fp32(_captions(input_ids)).split(num_captions.tolist())
        return embeds

    @torch.inference_mode()
    def score_embeds(self, image_embeds: Tensor, caption_embeds: Sequence[Tensor], input_ids: Tensor) -> Tensor:
        """As :meth:`forward`, of images float32 ``[N, D]`` and captions that have been encoded."""
        return self._cosine(image_embeds, torch.cat([*caption_embeds]), input_ids)

    def _cosine(self, images: Tensor, captions: Tensor, input_ids: Tensor) -> Tensor:
        if input_ids.ndim == 2:
            return (images * captions).sum(dim=-1)
        image_of = self.on_device(_is_caption(input_ids).nonzero()[:, 0])
        similarities = (images[image_of] * captions).sum(dim=-1)
        scores = similarities.new_empty(len(images))
        return scores.scatter_reduce(0, image_of, similarities, _REDUCTIONS[self.reduce], include_self=False)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """uint8 ``[N, 3, H, W]`` -> L2-normalised float32 ``[N, D]``, in :attr:`precision`.

        With ``flip``, the mean of the normalised embeddings of the image and its mirror image, of length at most one.
        """
        if self.is_exact:
            return self.encode_image_fp32(pixel_values)
        with self._low_precision():
            pixel_values = self.on_device(pixel_values)
            groups = torch.split(pixel_values, _IMAGE_GROUP.get(self.device.type, len(pixel_values)))
            return torch.cat([self._image_features(self.fast_model, group) for group in groups])

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """int64 ``[N, L]`` -> L2-normalised float32 ``[N, D]``, in :attr:`precision`.

        Equal captions are encoded once, and captions together with others of their length.
        """
        if self.is_exact:
            return self.encode_text_fp32(input_ids)
        distinct, inverse = torch.unique(input_ids, dim=0, return_inverse=True)
        lengths = self.preprocess.tokenize.used_lengths(distinct)
        order = lengths.argsort()
        with self._low_precision():
            features = [
                self._text_features(self.fast_model, self.on_device(distinct[group, : int(lengths[group[-1]])]))
                for group in torch.split(order, self._caption_group)
            ]
        return torch.cat(features)[self.on_device(order.argsort()[inverse])]

    def encode_image_fp32(self, pixel_values: Tensor) -> Tensor:
        """uint8 ``[N, 3, H, W]`` -> L2-normalised float32 ``[N, D]``, in float32."""
        return self._in_equal_batches(lambda rows: self._image_features(self.model, rows), pixel_values)

    def encode_text_fp32(self, input_ids: Tensor) -> Tensor:
        """int64 ``[N, L]`` -> L2-normalised float32 ``[N, D]``, in float32."""
        tokenize = self.preprocess.tokenize
        used = tokenize.used_lengths(input_ids)
        lengths = torch.maximum(used, (used + (-used % _FP32_TOKENS)).clamp(max=tokenize.max_length))
        groups = [(lengths == length).nonzero()[:, 0] for length in sorted(set(lengths.tolist()))]
        features = [
            self._in_equal_batches(
                lambda rows: self._text_features(self.model, rows),
                tokenize.fit(input_ids[group], int(lengths[group[0]])),
            )
            for group in groups
        ]
        return torch.cat(features)[self.on_device(torch.cat(groups).argsort())]

    def _in_equal_batches(self, encode: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        size, num_rows = self.fp32_rows, len(rows)
        if missing := -num_rows % _FP32_ROWS:
            rows = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
        rows = self.on_device(rows)
        with onednn_products(self.device, self.width):
            return torch.cat([encode(batch) for batch in torch.split(rows, size)])[:num_rows]

    def on_device(self, tensor: Tensor) -> Tensor:
        """The tensor on :attr:`device`."""
        # From page-locked memory, a copy waits in the queue of a GPU; from other memory, the host waits for that queue.
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _image_features(self, model: Towers, pixel_values: Tensor) -> Tensor:
        raise_if_cancelled()
        pixels = (pixel_values - self.pixel_mean) / self.pixel_std
        features = functional.normalize(model.image_features(pixels).float(), dim=-1)
        if not self.flip:
            return features
        mirrored = functional.normalize(model.image_features(pixels.flip(-1)).float(), dim=-1)
        # The dot product with this mean is the mean of both cosines, so it must not be normalised again.
        return (features + mirrored) / 2

    def _text_features(self, model: Towers, input_ids: Tensor) -> Tensor:
        raise_if_cancelled()
        return functional.normalize(model.text_features(input_ids).float(), dim=-1)

    @contextmanager
    def _low_precision(self) -> Iterator[None]:
        # Nothing to cache: the weights are in low precision already.
        autocast = torch.autocast(self.device.type, DTYPES[self.precision], cache_enabled=False)
        with autocast, onednn_products(self.device, self.width):
            yield


#: torch's names.
_REDUCTIONS = {"max": "amax", "mean": "mean", "min": "amin"}


def _is_caption(input_ids: Tensor) -> Tensor:
    """Bool ``[N]`` or ``[N, K]``: which rows are captions."""
    return input_ids[..., 0] != NO_CAPTION


def _captions(input_ids: Tensor) -> Tensor:
    """int64 ``[N, L]`` or ``[N, K, L]`` -> ``[M, L]``, the captions of all images one after another."""
    return input_ids if input_ids.ndim == 2 else input_ids[_is_caption(input_ids)]


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)
