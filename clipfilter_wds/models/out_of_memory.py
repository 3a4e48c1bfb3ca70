"""Says which batch, or model, did not fit where memory runs out, and which option makes it smaller."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clipfilter_wds.models.dual_encoder import ModelError

#: What torch raises as a plain ``RuntimeError``: on a CPU, in oneDNN there, where a library on a GPU allocates by
#: itself, for page-locked memory, and for files.
_MESSAGES = (
    "can't allocate memory",
    "could not create a primitive",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "CUDA error: out of memory",
    "Cannot allocate memory",
)

#: Samples that are scored together whatever the batch size: those that the error of low precision is measured on.
FEWEST = 32


class BatchTooLargeError(ValueError):
    """A batch takes more memory than the device has free."""


@contextmanager
def memory_for(num_samples: int, device: torch.device) -> Iterator[None]:
    """Have what is raised in this context where memory runs out say how many samples were scored together.

    Raises:
        BatchTooLargeError: When memory runs out; with torch's own error as the cause.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cure = "choose a smaller model"
        if num_samples > FEWEST:
            cure = f"choose a smaller batch_size (of a ClipFilterLoader: score_batch_size), such as {num_samples // 2}"
        raise BatchTooLargeError(
            f"{num_samples} samples are scored at a time, which takes more memory than {_free(device)}; {cure}, or "
            f"leave {device} more"
        ) from error


@contextmanager
def memory_for_model(name: str, device: torch.device) -> Iterator[None]:
    """Have what is raised in this context where memory runs out say that the model does not fit.

    Args:
        name: What the user called it.
        device: Where it is to be.

    Raises:
        ModelError: When memory runs out; with the error itself as the cause.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{name!r} takes more memory than {_free(device)}; choose a smaller model, or leave {device} more"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(message in str(error) for message in _MESSAGES)


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return "there is for this process"
    try:
        in_bytes = torch.cuda.memory_reserved(device), *torch.cuda.mem_get_info(device)
    except RuntimeError:  # there is not even enough to ask
        return f"{device} has"
    held, free, total = (f"{number / 2**30:.1f}" for number in in_bytes)
    return f"{device} has (of {total} GiB this process holds {held}, and {free} are free)"
