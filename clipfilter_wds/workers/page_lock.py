"""Page-locks memory, so that a GPU copies from it while the host goes on."""

import logging
import weakref
from contextlib import suppress
from functools import cache

import torch

_log = logging.getLogger(__name__)


def page_lock(memory: torch.Tensor) -> None:
    """Page-lock all of a tensor's memory until the tensor is let go of. Where that is refused, it stays as it is."""
    address, cudart = memory.data_ptr(), torch.cuda.cudart()
    if int(cudart.cudaHostRegister(address, memory.nbytes, 0)) == 0:
        weakref.finalize(memory, cudart.cudaHostUnregister, address)
        return
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # CUDA tells of the refusal once more, with the next thing that is done
    _warn()


@cache
def _warn() -> None:
    _log.warning(
        "memory for batches can't be page-locked, so each is copied once more on its way to the GPU; `ulimit -l` may "
        "limit it"
    )
