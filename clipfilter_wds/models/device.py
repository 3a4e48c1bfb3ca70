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
