"""Turns pixels into the first features of an image tower."""

from typing import Any

import torch
from torch import Tensor, nn

from clipfilter_wds.models.fast.linear import linear_of

#: Changes no bit of a pixel, and has float16 hold the weights that pixels meet.
_PIXEL_SCALE = 2.0**-8


def embeds_patches(convolution: nn.Conv2d) -> bool:
    """Whether the windows of a convolution cover an image side by side."""
    is_plain = convolution.groups == 1 and convolution.dilation == (1, 1) and convolution.padding in ((0, 0), "valid")
    return is_plain and convolution.kernel_size == convolution.stride


class PatchEmbedding(nn.Module):
    """A convolution whose windows do not overlap, as one matrix product, which is faster on a CPU."""

    shift: Tensor | None

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.size = convolution.kernel_size
        bias = None if convolution.bias is None else convolution.bias.data
        self.linear = linear_of(convolution.weight.data.flatten(1), bias)
        self.register_buffer("shift", None)

    @property
    def weight(self) -> Tensor:
        """The calling library casts the pixels to its type."""
        return self.linear.weight

    def normalize(self, mean: Tensor, std: Tensor) -> None:
        """Take whole numbers in 0..255 for pixels from now on, and normalise them by the weights.

        What is left of a pixel, the nearest whole number to the mean taken away, is exact in low precision too.

        Args:
            mean: float32 ``[C]``, of pixels in 0..255.
            std: Likewise.
        """
        of_channel = self.linear.weight.data.unflatten(1, (len(mean), -1)) / std[:, None]
        bias = (of_channel.sum(-1) * (mean.round() - mean)).sum(-1)
        if self.linear.bias is not None:
            bias = bias + self.linear.bias.data
        self.linear = linear_of((of_channel / _PIXEL_SCALE).flatten(1), bias)
        self.shift = -mean.round()[:, None, None] * _PIXEL_SCALE

    def forward(self, pixels: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, D, H // size, W // size]``."""
        (high, wide), (height, width) = self.size, pixels.shape[2:]
        patches = pixels[:, :, : height // high * high, : width // wide * wide]
        patches = patches.unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 2, 4, 1, 3, 5)
        if self.shift is not None:
            out = None
            if not torch.compiler.is_compiling():  # patch by patch at once
                out = torch.empty(patches.shape, dtype=self.weight.dtype, device=patches.device)
            patches = torch.add(self.shift.to(self.weight.dtype), patches, alpha=_PIXEL_SCALE, out=out)
        features: Tensor = self.linear(patches.flatten(3))
        return features.permute(0, 3, 1, 2)


class ImageEmbeddings(nn.Module):
    """Patches at their positions, in CLIP behind a token for the whole image.

    Args:
        usual: Those of CLIP or SigLIP in ``transformers``.
    """

    first: Tensor
    positions: Tensor

    def __init__(self, usual: Any) -> None:
        super().__init__()
        self.patch_embedding, self.size = usual.patch_embedding, (usual.image_size, usual.image_size)
        positions = usual.position_embedding.weight.data
        self.num_before = int(hasattr(usual, "class_embedding"))
        before = positions[: self.num_before]
        self.register_buffer("first", before + usual.class_embedding.data if self.num_before else before)
        self.register_buffer("positions", positions[self.num_before :])

    def forward(self, pixel_values: Tensor, **_: object) -> Tensor:
        """``[N, C, H, W]`` -> float32 ``[N, T, D]``.

        Raises:
            ValueError: When images are of another size than the tower's.
        """
        if pixel_values.shape[2:] != self.size:
            (height, width), (wanted, _) = pixel_values.shape[2:], self.size
            raise ValueError(
                f"an image size of {height}x{width} doesn't match the model's {wanted}x{wanted}; pass on the "
                "pixel_values that scorer.preprocess gives"
            )
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        shape = len(patches), self.num_before + patches.shape[1], patches.shape[2]
        states = torch.empty(shape, dtype=torch.float32, device=patches.device)
        states[:, : self.num_before] = self.first
        torch.add(patches, self.positions, out=states[:, self.num_before :])
        return states


def normalize_in_weights(towers: nn.Module, mean: Tensor, std: Tensor) -> bool:
    """Have image towers take uint8 pixels, where that can be done, which spares passes over memory.

    Args:
        towers: With the layers of this module, in float32. Changed in place.
        mean: float32 ``[C]``, of pixels in 0..255.
        std: Likewise.
    """
    embeddings = [module.patch_embedding for module in towers.modules() if isinstance(module, ImageEmbeddings)]
    if not embeddings or not all(isinstance(patches, PatchEmbedding) for patches in embeddings):
        return False
    for patches in embeddings:
        patches.normalize(mean, std)
    return True
