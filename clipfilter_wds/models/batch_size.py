"""Chooses how many samples are scored together, from the device and the width of the model."""

import torch

#: On a CPU, larger batches are no faster and take more memory.
_ON_CPU = 64

#: On a GPU, enough to keep all of it busy: up to which width of the wider tower, how many samples.
_ON_GPU = ((512, 1024), (768, 512), (1024, 256))

#: The same for models that are wider still.
_WIDEST_ON_GPU = 128


def default_batch_size(device: torch.device, width: int) -> int:
    """How many samples to score together on a device, with a model whose wider tower has this width.

    On a GPU, 512 for a ViT-B, 256 for a ViT-L, 128 for wider ones.
    """
    if device.type != "cuda":
        return _ON_CPU
    return next((batch_size for most, batch_size in _ON_GPU if width <= most), _WIDEST_ON_GPU)
