"""Says which batch did not fit where memory runs out, and which option makes it smaller."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: What torch raises as a plain ``RuntimeError``: on a CPU, in oneDNN there, where a library on a GPU allocates by
#: itself, and for page-locked memory.
_MESSAGES = ("can't allocate memory", "could not create a primitive", "ALLOC_FAILED", "CUDA error: out of memory")

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
        if not _is_out_of_memory(error):
            raise
        cure = "choose a smaller model"
        if num_samples > FEWEST:
            cure = f"choose a smaller batch_size (of a ClipFilterLoader: score_batch_size), such as {num_samples // 2}"
        raise BatchTooLargeError(
            f"{num_samples} samples are scored at a time, which takes more memory than {_free(device)}; {cure}, or "
            f"leave {device} more"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(message in str(error) for message in _MESSAGES)


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return "there is for this process"
    in_bytes = torch.cuda.memory_reserved(device), *torch.cuda.mem_get_info(device)
    held, free, total = (f"{number / 2**30:.1f}" for number in in_bytes)
    return f"{device} has (of {total} GiB this process holds {held}, and {free} are free)"
