"""Runs the same test on the CPU, always, and on a GPU where there is one."""

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

#: Parameters of a test that runs on both.
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


def fast_precision(device: str) -> str:
    """The precision that ``auto`` chooses for wide models on this kind of device."""
    return "fp16" if device == "cuda" else "bf16"
