"""Picks the device to compute on, and moves tensors there."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def resolve_device(device: str) -> torch.device:
    """The torch device that ``device`` names; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: When it names a device that this machine does not have, or that torch can't compute on.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; use auto, cpu, cuda or cuda:1") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    if resolved.type not in ("cpu", "cuda"):
        try:
            torch.ones(1, device=resolved).item()
        except Exception as error:  # what torch raises for what it was not built with is anything
            raise ValueError(f"torch can't compute on {device!r} here; use auto, cpu, cuda or cuda:1") from error
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


def fetching(
    finish: Callable[[], tuple[Sequence[Tensor], T]], device: torch.device
) -> Callable[[], tuple[list[np.ndarray], T]]:
    """Start copying tensors to the host. Returns a function that waits for them; what comes with them stays as it is.

    Args:
        finish: Gives the tensors, and what comes with them. What runs on the host is waited for when they are.
        device: Where they are computed.
    """
    if device.type != "cuda":

        def finished() -> tuple[list[np.ndarray], T]:
            tensors, rest = finish()
            return [tensor.cpu().numpy() for tensor in tensors], rest

        return finished
    tensors, rest = finish()
    hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True) for tensor in tensors]
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # others, such as workers that decode, can use the core meanwhile
    copied.record(torch.cuda.current_stream(device))

    def wait() -> tuple[list[np.ndarray], T]:
        copied.synchronize()
        return [host.numpy() for host in hosts], rest

    return wait
