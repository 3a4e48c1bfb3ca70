"""Counts the CPUs that this process may use."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def default_num_workers(device: "torch.device") -> int:
    """Worker processes that suit a device: one per CPU for a GPU, one per two CPUs when these also run the model."""
    available = num_cpus()
    return max(1, available if device.type == "cuda" else available // 2)


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
