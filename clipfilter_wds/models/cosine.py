"""Compares embeddings of images with those of their captions."""

import torch
from torch import Tensor

from clipfilter_wds.models.config import Reduce
from clipfilter_wds.models.device import to_device
from clipfilter_wds.preprocess.tokens import NO_CAPTION

#: As ``scatter_reduce`` calls them.
_REDUCTIONS: dict[Reduce, str] = {"max": "amax", "mean": "mean", "min": "amin"}


def captions_of(input_ids: Tensor) -> Tensor:
    """int64 ``[N, L]`` or ``[N, K, L]`` -> ``[M, L]``, the captions of all images one after another."""
    return input_ids if input_ids.ndim == 2 else input_ids[_is_caption(input_ids)]


def num_captions(input_ids: Tensor) -> list[int]:
    """How many captions each image has, of int64 ``[N, L]`` or ``[N, K, L]``."""
    counts: list[int] = _is_caption(input_ids).view(len(input_ids), -1).sum(dim=1).tolist()
    return counts


def cosines(images: Tensor, captions: Tensor, input_ids: Tensor, reduce: Reduce) -> Tensor:
    """Cosine similarity of each image with its captions.

    Args:
        images: float32 ``[N, D]``, L2-normalised.
        captions: Those of :func:`captions_of`, likewise ``[M, D]``.
        input_ids: int64 ``[N, L]`` or ``[N, K, L]``, which tells whose captions they are.
        reduce: Which similarity counts where an image has several captions.

    Returns:
        float32 ``[N]`` in [-1, 1] up to rounding; not clipped.
    """
    if input_ids.ndim == 2:
        return (images * captions).sum(dim=-1)
    image_of = to_device(_is_caption(input_ids).nonzero()[:, 0], images.device)
    similarities = (images[image_of] * captions).sum(dim=-1)
    scores = similarities.new_empty(len(images))
    return torch.scatter_reduce(scores, 0, image_of, similarities, _REDUCTIONS[reduce], include_self=False)


def _is_caption(input_ids: Tensor) -> Tensor:
    """Bool ``[N]`` or ``[N, K]``: which rows are captions, and not filled up."""
    return input_ids[..., 0] != NO_CAPTION
