"""Stands in for a GPU: torch's fake tensors have a device and a shape there, and no values."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipfilter_wds.models.fast.graphs import Captured

#: The last that can be stood in for, which hardly a machine has: what is found out of a device is remembered.
GPU = torch.device("cuda", 7)


class _OnlyOnGpu(TorchDispatchMode):
    """Refuses what a capture would: to copy from the host or to it. Fake tensors refuse to be looked at."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device != GPU:
                raise AssertionError(f"{operation} has a tensor on {tensor.device}")
        return result


class FakeGpuGraphs:
    """Captures nothing, and sees that it could be captured.

    Attributes:
        num_captures: How often.
    """

    def __init__(self) -> None:
        self.device, self.num_captures = GPU, 0
        self.can_capture = True

    def capture(self, compute: Callable[[], torch.Tensor]) -> Captured:
        """See ``Graphs``."""
        self.num_captures += 1
        with _OnlyOnGpu():
            return Captured(lambda: None, compute())

    def turn(self) -> AbstractContextManager[None]:
        """See ``Graphs``."""
        return nullcontext()


@contextmanager
def on_fake_gpu(patch: pytest.MonkeyPatch, module: nn.Module) -> Iterator[None]:
    """Move a module there, and have whatever is computed in this context be fake."""
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    # What autocast asks for.
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor.detach())
                    with mode:
                        tensors[name] = fake.to(GPU)
    with mode:
        yield
