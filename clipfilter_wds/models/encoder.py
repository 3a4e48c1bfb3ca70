"""Turns pixels and tokens into embeddings: exactly, in float32, or fast, in low precision."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn

from clipfilter_wds.models.config import Precision
from clipfilter_wds.models.cosine import captions_of
from clipfilter_wds.models.device import pixels_to_device, to_device
from clipfilter_wds.models.dual_encoder import DualEncoder, Towers
from clipfilter_wds.models.fast.float32 import check_float32_products, keep_convolutions
from clipfilter_wds.models.fast.graphs import GraphedFunction, Graphs
from clipfilter_wds.models.fast.low_precision import low_precision_towers
from clipfilter_wds.models.fast.onednn import onednn_linear
from clipfilter_wds.models.fast.optimize import optimize_layers
from clipfilter_wds.models.precision import DTYPES, NARROW

#: Float32 batches are filled up to a multiple of so many rows. They are cut into pieces of so many for wide models on
#: a CPU (as fast as larger ones, in less memory), and into larger ones elsewhere.
_EXACT_ROWS, _MOST_EXACT_ROWS = 8, 64

#: Captions are filled up to a multiple of so many tokens for float32, and encoded with others of that length.
_EXACT_TOKENS = 32

#: Images that are encoded together in low precision; elsewhere the whole batch. The activations of more than about 40
#: at ViT-B/32 are over 32 MB each, which glibc gives back to the system after every layer and has to clear again (a
#: tenth of the time).
_FAST_IMAGES = {"cpu": 32}

#: Captions that are encoded together in low precision, in order of length: fewer need less padding, but more calls.
_FAST_CAPTIONS = {"cpu": 16, "cuda": 256}

#: The same where no padding is computed.
_PACKED_CAPTIONS = 64

#: Called before every batch that is computed. What it raises ends the work.
Check = Callable[[], None]


def no_check() -> None:
    """Let the work run to its end."""


class Encoder(nn.Module):
    """Pixels and tokens -> embeddings that can be compared.

    Args:
        model: The loaded model.
        towers: Its own, or others in ``dtype``.
        flip: Whether an image's embedding is the mean of its own and its mirror image's.
        dtype: What matrices are multiplied in.
        graphs: Captures the towers; None has every layer launched anew.
        fill: Number of rows -> what it is filled up to, where towers are captured; each is captured once.

    Attributes:
        width: Of the wider tower.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        model: DualEncoder,
        towers: Towers,
        *,
        flip: bool,
        dtype: torch.dtype = torch.float32,
        graphs: Graphs | None = None,
        fill: Callable[[int], int] = int,
    ) -> None:
        super().__init__()
        self._images: Callable[[Tensor], Tensor] = self._image_features
        self._texts: Callable[[Tensor], Tensor] = self._text_features
        self._graphed: list[GraphedFunction] = []
        if graphs is not None:
            self._graphed = [GraphedFunction(features, graphs, fill) for features in (self._images, self._texts)]
            self._images, self._texts = self._graphed
        self.towers, self.width = towers, model.width
        self._tokenize, self._flip, self._dtype = model.preprocess.tokenize, flip, dtype
        self._view_size = model.preprocess.view.crop
        self.register_buffer("pixel_mean", model.pixel_mean[:, None, None])
        self.register_buffer("pixel_std", model.pixel_std[:, None, None])

    @property
    def device(self) -> torch.device:
        """Where embeddings are computed."""
        return self.pixel_mean.device

    @property
    def is_graphed(self) -> bool:
        """Whether the towers are captured, for batches of fixed shapes."""
        return bool(self._graphed)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, *, check: Check = no_check) -> tuple[Tensor, Tensor]:
        """Embed N images and their M captions, int64 ``[N, L]`` or ``[N, K, L]``: float32 ``[N, D]`` and ``[M, D]``."""
        if not len(pixel_values):
            nothing = torch.empty(0, 0, dtype=torch.float32, device=self.device)
            return nothing, nothing
        images = self.encode_image(pixel_values, check=check)
        return images, self.encode_text(captions_of(input_ids), check=check)

    @abstractmethod
    def encode_image(self, pixel_values: Tensor, *, check: Check = no_check) -> Tensor:
        """uint8 ``[N, 3, H, W]`` -> L2-normalised float32 ``[N, D]``.

        With ``flip``, the mean of the normalised embeddings of the image and its mirror image, of length at most one.
        """

    @abstractmethod
    def encode_text(self, input_ids: Tensor, *, check: Check = no_check) -> Tensor:
        """int64 ``[N, L]`` -> L2-normalised float32 ``[N, D]``."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Called by .to() and its like: graphs go on reading weights where they were captured.
        for function in self._graphed:
            function.clear()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)  # in another type, if the module around is cast
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        applied: Self = super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return applied

    @torch.inference_mode()
    def _encode(self, batches: Iterable[Tensor], features: Callable[[Tensor], Tensor], check: Check) -> Tensor:
        is_low = self._dtype != torch.float32
        # Nothing to cache: the weights are in low precision already.
        autocast = torch.autocast(self.device.type, self._dtype, enabled=is_low, cache_enabled=False)
        embeds = []
        with autocast, onednn_linear(self.device, self.width):
            for batch in batches:
                check()
                embeds.append(features(batch))
            return torch.cat(embeds)

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values if self.towers.normalizes else (pixel_values - self.pixel_mean) / self.pixel_std
        features = _normalized(self.towers.image_features(pixels).float())
        if not self._flip:
            return features
        mirrored = _normalized(self.towers.image_features(pixels.flip(-1)).float())
        # The dot product with this mean is the mean of both cosines, so it must not be normalised again.
        return (features + mirrored) / 2

    def _text_features(self, input_ids: Tensor) -> Tensor:
        return _normalized(self.towers.text_features(input_ids).float())


class ExactEncoder(Encoder):
    """Embeds in float32, in batches of fixed shapes.

    Kernels are chosen by shape, so an embedding does not depend on which samples, or how many, it is encoded with.

    Attributes:
        batch_rows: Rows that are computed together.
    """

    def __init__(self, model: DualEncoder, device: torch.device, *, flip: bool, graphs: Graphs | None = None) -> None:
        super().__init__(model, model.towers, flip=flip, graphs=graphs)
        is_on_cpu, is_wide = device.type == "cpu", model.width >= NARROW
        self.batch_rows = _EXACT_ROWS if is_on_cpu and is_wide else _MOST_EXACT_ROWS
        # A GPU chooses other kernels for 8 rows than for 64, and other bits with them.
        self._full_rows = _EXACT_ROWS if is_on_cpu else self.batch_rows
        if is_wide or not is_on_cpu:
            optimize_layers(self.towers)
        if not is_on_cpu:
            keep_convolutions(self.towers)

    def encode_image(self, pixel_values: Tensor, *, check: Check = no_check) -> Tensor:
        """See :class:`Encoder`."""
        return self._in_fixed_batches(pixel_values, self._images, check)

    def encode_text(self, input_ids: Tensor, *, check: Check = no_check) -> Tensor:
        """See :class:`Encoder`."""
        tokenize = self._tokenize
        used = tokenize.used_lengths(input_ids)
        lengths = torch.maximum(used, (used + (-used % _EXACT_TOKENS)).clamp(max=tokenize.max_length))
        groups = [(lengths == length).nonzero()[:, 0] for length in sorted(set(lengths.tolist()))]
        embeds = [
            self._in_fixed_batches(tokenize.fit(input_ids[group], int(lengths[group[0]])), self._texts, check)
            for group in groups
        ]
        return torch.cat(embeds)[to_device(torch.cat(groups).argsort(), self.device)]

    def warm_up(self) -> None:
        """Capture what every float32 batch is computed by, where there are graphs."""
        rows, tokenize = self.batch_rows, self._tokenize
        self.encode_image(torch.zeros(rows, 3, *self._view_size, dtype=torch.uint8))
        shorter = () if tokenize.pads_to_max else range(_EXACT_TOKENS, tokenize.max_length, _EXACT_TOKENS)
        for length in (*shorter, tokenize.max_length):
            self._encode([torch.zeros(rows, length, dtype=torch.int64, device=self.device)], self._texts, no_check)

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        check_float32_products(self.device)
        return super()._image_features(pixel_values)

    def _text_features(self, input_ids: Tensor) -> Tensor:
        check_float32_products(self.device)
        return super()._text_features(input_ids)

    def _in_fixed_batches(self, rows: Tensor, features: Callable[[Tensor], Tensor], check: Check) -> Tensor:
        num_rows = len(rows)
        if missing := -num_rows % self._full_rows:
            rows = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
        return self._encode(to_device(rows, self.device).split(self.batch_rows), features, check)[:num_rows]


class FastEncoder(Encoder):
    """Embeds in low precision, with a copy of the model's towers, in as little time as possible.

    Equal captions are encoded once, and captions together with others of their length.
    """

    def __init__(
        self, model: DualEncoder, device: torch.device, *, flip: bool, precision: Precision, compiled: bool
    ) -> None:
        towers, is_packed = low_precision_towers(model, DTYPES[precision], packed=device.type == "cpu")
        if compiled:
            # With as many threads as the calling thread has, and not as the one had that it was compiled in.
            towers.compile(with_text=not is_packed, dynamic=True, options={"cpp.dynamic_threads": True})
        super().__init__(model, towers, flip=flip, dtype=DTYPES[precision])
        self._num_captions = _PACKED_CAPTIONS if is_packed else _FAST_CAPTIONS.get(device.type, 256)

    def encode_image(self, pixel_values: Tensor, *, check: Check = no_check) -> Tensor:
        """See :class:`Encoder`."""
        pixel_values = pixels_to_device(pixel_values, self.device)
        batches = pixel_values.split(_FAST_IMAGES.get(self.device.type, len(pixel_values)))
        return self._encode(batches, self._images, check)

    def encode_text(self, input_ids: Tensor, *, check: Check = no_check) -> Tensor:
        """See :class:`Encoder`."""
        distinct, inverse = torch.unique(input_ids, dim=0, return_inverse=True)
        lengths = self._tokenize.used_lengths(distinct)
        order = lengths.argsort()
        batches = (
            to_device(distinct[group, : int(lengths[group[-1]])], self.device)
            for group in order.split(self._num_captions)
        )
        embeds = self._encode(batches, self._texts, check)
        return embeds[to_device(order.argsort()[inverse], self.device)]


def _normalized(features: Tensor) -> Tensor:
    """float32 ``[N, D]`` divided by its norms. A norm of zero, or one that overflows, gives NaN: there is no cosine."""
    norms = features.norm(dim=-1, keepdim=True)
    # torch's own normalize divides by at least 1e-12, which shrinks the cosines of small embeddings.
    normalized: Tensor = features / norms.masked_fill(norms.isinf(), torch.nan)
    return normalized
