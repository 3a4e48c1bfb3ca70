"""Names, where a function of the user's raises an error, the option that it was given as and the sample."""

from collections.abc import Iterator
from contextlib import contextmanager

from clipfilter_wds.shards.names import public_url
from clipfilter_wds.types import UnusableError


@contextmanager
def running(option: str, key: str, url: str) -> Iterator[None]:
    """Run a function of the user's on a sample. Workers send an error's notes along.

    Raises:
        RuntimeError: Instead of ``StopIteration``, which would end a stream.
    """
    try:
        yield
    except UnusableError:
        raise
    except Exception as error:
        note = f"in {option}, of sample {key!r} of {public_url(url)}"
        if isinstance(error, StopIteration):
            # Not "from error", of which contextlib would make the StopIteration again.
            raise RuntimeError(f"StopIteration was raised {note}").with_traceback(error.__traceback__) from None
        error.add_note(note)
        raise


@contextmanager
def collating(option: str) -> Iterator[None]:
    """Collate what a function of the user's gave of several samples."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"where what {option} gave of several samples is made a batch: it needs tensors or arrays of one shape, "
            "numbers or texts, or dicts, lists or tuples of these, alike for all samples"
        )
        raise
