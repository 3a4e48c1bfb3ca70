"""Picks the device to compute on, and moves tensors there."""

import torch
from torch import Tensor


def resolve_device(device: str) -> torch.device:
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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``, without waiting for what a GPU still has to do."""
    # A copy from page-locked memory is queued on the GPU; a copy from other memory waits for the queue to drain.
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pixels_to_device(pixel_values: Tensor, device: torch.device) -> Tensor:
    """uint8 ``[N, 3, H, W]`` on ``device``, likewise; interleaved pixels are copied with their padding, as they lie."""
    num_views, _, height, width = pixel_values.shape
    interleaved = (height * width * 4, 1, width * 4, 4)
    if device.type == "cpu" or not num_views or pixel_values.stride() != interleaved:
        return to_device(pixel_values, device)
    padded = pixel_values.as_strided((num_views, height, width, 4), (height * width * 4, width * 4, 4, 1))
    return to_device(padded, device).permute(0, 3, 1, 2)[:, :3]
