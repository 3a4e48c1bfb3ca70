"""Scores batches of images and captions with a CLIP model."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipfilter_wds.models.config import DEFAULT_MODEL, ScorerConfig
from clipfilter_wds.models.cosine import cosines
from clipfilter_wds.models.device import resolve_device
from clipfilter_wds.models.device_resize import views_on_device
from clipfilter_wds.models.encoder import Encoder, ExactEncoder, FastEncoder
from clipfilter_wds.models.fast.graphs import CudaGraphs, Graphs
from clipfilter_wds.models.graphed_encoder import GraphedEncoder
from clipfilter_wds.models.loading import load_model
from clipfilter_wds.models.out_of_memory import memory_for, memory_for_model
from clipfilter_wds.models.precision import DTYPES, resolve_precision
from clipfilter_wds.options import check_options
from clipfilter_wds.preprocess.packed import Images


class ClipScorer(nn.Module):
    """Scores image-caption pairs by the cosine similarity of their CLIP embeddings.

    The reference is DataFlow-MM's ``ImageClipFilter``: ``CLIPProcessor`` and ``CLIPModel`` in float32, both embeddings
    L2-normalised, dot product.

    Args:
        model: A hub id, a local folder or ``demo-tiny``; see :class:`ScorerConfig`.
        options: The other attributes of :class:`ScorerConfig`.

    Attributes:
        model_name: What was given as ``model``.
        preprocess: Samples -> ``pixel_values`` and ``input_ids``; picklable, for workers.
        precision: What ``auto`` has become.
        reduce: Which similarity counts where an image has several captions.
        flip: Whether the mirrored image is scored too.
        temperature: 1 / exp(logit_scale), what cosines are divided by in training; None where the checkpoint has none.
        exact: Embeds in float32.
        fast: Embeds in :attr:`precision`; where that is fp32, the same as :attr:`exact`.

    Raises:
        ModelError: When there is no such model, it is none of these, has no safetensors weights, or the hub can't be
            reached.
        ValueError: When an option can't be used, or not with the others.
        TypeError: When there is no such option.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, **options: Any) -> None:
        super().__init__()
        check_options(type(self).__name__, options, ScorerConfig)
        config = ScorerConfig(model=model, **options)
        device = resolve_device(config.device)
        with memory_for_model(str(config.model), device):
            self._load(config, device)

    def _load(self, config: ScorerConfig, device: torch.device) -> None:
        loaded = load_model(config.model, config.revision)
        self.model_name, self.reduce, self.flip = str(config.model), config.reduce, config.flip
        self.temperature = loaded.temperature
        self.precision = resolve_precision(config.precision, device, loaded.width)
        self.preprocess = loaded.preprocess.with_view(
            fast_decode=config.fast_decode, resize_on_device=config.resize_on_device
        )
        self._fingerprint = {
            "score": "cosine",
            "model": self.model_name,
            "family": loaded.family,
            "weights": loaded.towers.weights_hash(),
            **self.preprocess.fingerprint,
            "mean": list(loaded.mean),
            "std": list(loaded.std),
            "precision": self.precision,
            "reduce": config.reduce,
            "flip": config.flip,
        }
        if config.compile and self.precision == "fp32":
            raise ValueError("compile is for low precision, and precision is fp32 here: leave compile out")
        graphs: Graphs | None = None
        if config.cuda_graphs and device.type == "cuda":
            graphs = CudaGraphs(device)
        fast: Encoder | None = None  # first, since it copies the towers
        if self.precision != "fp32" and graphs is not None and not config.compile:
            fast = GraphedEncoder(loaded, flip=config.flip, dtype=DTYPES[self.precision], graphs=graphs)
        elif self.precision != "fp32":
            fast = FastEncoder(loaded, device, flip=config.flip, precision=self.precision, compiled=config.compile)
        self.exact = ExactEncoder(loaded, device, flip=config.flip, graphs=graphs)
        self.fast: Encoder = self.exact if fast is None else fast
        self.requires_grad_(False).eval().to(device)
        if graphs is not None:
            self.exact.warm_up()  # so that whatever torch is told later, float32 is computed as it was captured

    @property
    def device(self) -> torch.device:
        """Where scores are computed."""
        return self.exact.device

    @property
    def copies_inputs(self) -> bool:
        """Whether batches are copied to a memory of its own before anything is computed, as a GPU's is."""
        return self.device.type != "cpu"

    @cached_property
    def embedding_dim(self) -> int:
        """How many numbers an embedding has."""
        caption = torch.zeros(1, self.preprocess.tokenize.max_length, dtype=torch.int64)
        return self.exact.encode_text(caption).shape[1]

    def describe_embeddings(self, dtype: str) -> dict[str, Any]:
        """What score tables say of embeddings that are saved as ``float16`` or ``float32``. JSON-ready."""
        return {"dtype": dtype, "dim": self.embedding_dim, "temperature": self.temperature}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on beside the sample: weights, preprocessing, text handling, precision. JSON-ready."""
        return dict(self._fingerprint)

    def warm_up(self, batch_size: int) -> None:
        """Capture CUDA graphs for batches of up to so many samples; without them there is nothing to do.

        Call it in the main thread before a thread scores beside training: it can't be done while another thread draws
        random numbers. What scores in the main thread captures what it needs.

        Raises:
            BatchTooLargeError: When such a batch takes more memory than the device has free.
        """
        if not self.exact.is_graphed:
            return
        with memory_for(batch_size, self.device):
            self.exact.warm_up()
            if isinstance(self.fast, GraphedEncoder):
                self.fast.warm_up(batch_size)

    def views(self, images: Images) -> Tensor:
        """uint8 ``[N, 3, H, W]`` on :attr:`device`, without waiting for what a GPU still has to do.

        Raises:
            TypeError: When they are floats, such as those that ``CLIPProcessor`` has normalised already.
        """
        if isinstance(images, Tensor) and images.is_floating_point():
            raise TypeError(f"pixel_values are {images.dtype}; pass on the uint8 that scorer.preprocess gives")
        return views_on_device(images, self.device)

    def forward(self, pixel_values: Images, input_ids: Tensor, *, exact: bool = False) -> Tensor:
        """Cosine similarity of N images with their captions.

        Args:
            pixel_values: uint8 ``[N, 3, H, W]`` as :attr:`preprocess` makes them, on any device; or packed images.
            input_ids: int64 ``[N, L]`` likewise; or ``[N, K, L]`` for up to K captions per image, of whose similarities
                the result is the largest, mean or smallest.
            exact: Compute in float32 whatever :attr:`precision` is: the reference that decides near a threshold.

        Returns:
            float32 ``[N]`` in [-1, 1] up to rounding, on :attr:`device`; not clipped.

        Raises:
            TypeError: When ``pixel_values`` are floats.
            BatchTooLargeError: When they take more memory than the device has free.
        """
        encoder = self.exact if exact else self.fast
        with memory_for(len(pixel_values), self.device):
            images, captions = encoder(self.views(pixel_values), input_ids)
            return cosines(images, captions, input_ids, self.reduce)
