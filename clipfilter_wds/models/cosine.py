"""Compares embeddings of images with those of their captions."""

import torch
from torch import Tensor
from torch.nn import functional

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
    is_caption = _is_caption(input_ids).long()
    counts: list[int] = (is_caption if is_caption.ndim == 1 else is_caption.sum(dim=1)).tolist()
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


def unit_embeddings(images: Tensor, captions: Tensor, input_ids: Tensor, reduce: Reduce) -> Tensor:
    """One embedding for each image and one for its captions.

    Args:
        images: As :func:`cosines` takes them, but of any length.
        captions: Likewise.
        input_ids: Likewise.
        reduce: Of several captions, ``max`` and ``min`` take the first whose similarity is the one that counts, and
            ``mean`` the mean.

    Returns:
        float32 ``[2, N, D]``: of the images, and of the captions, all L2-normalised.
    """
    if input_ids.ndim == 2:
        return functional.normalize(torch.stack([images, captions]), dim=-1)
    if reduce == "mean":
        counts = to_device(torch.tensor(num_captions(input_ids), dtype=torch.int64), images.device)
        # Each image's captions one after another, so that the sum is the same at any time; lengths need no check.
        found = torch.segment_reduce(captions, "mean", lengths=counts, axis=0, unsafe=True)
    else:
        owners, turns = (to_device(places, images.device) for places in _is_caption(input_ids).nonzero(as_tuple=True))
        sign = 1.0 if reduce == "max" else -1.0
        similarities = images.new_full(input_ids.shape[:2], -torch.inf)
        similarities[owners, turns] = sign * (images[owners] * captions).sum(dim=-1)
        caption_of = owners.new_zeros(input_ids.shape[:2])
        caption_of[owners, turns] = torch.arange(len(captions), device=images.device)
        found = captions[caption_of.gather(1, similarities.argmax(dim=1, keepdim=True))[:, 0]]
    return functional.normalize(torch.stack([images, found]), dim=-1)


def _is_caption(input_ids: Tensor) -> Tensor:
    """Bool ``[N]`` or ``[N, K]``: which rows are captions, and not filled up."""
    return input_ids[..., 0] != NO_CAPTION
