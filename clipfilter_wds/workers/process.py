"""Sets up a worker process: its signals, its memory, and its end when the parent is gone."""

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

#: Seconds until a worker notices that its parent is gone.
_PARENT_SECONDS = 1.0


def init_worker(worker: int) -> None:
    """Prepare the process that calls it to read and decode (called by DataLoader)."""
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # a worker is one core's worth of work
    # Ctrl-C reaches every process of a terminal; only the parent answers it, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever the parent does with it
    sys.excepthook = _report_unless_parent_ended
    if torch := sys.modules.get("torch"):  # copying takes none
        torch.set_default_device(None)  # a forked process can't use the script's GPU
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it has a line for every odd image
    gc.freeze()  # else a collection would write to the memory shared with the parent, and so copy it
    threading.Thread(target=_end_with_parent, name="clipfilter-parent", daemon=True).start()


@contextmanager
def starting() -> Iterator[None]:
    """Say what to do where the processes that are started in this context can't be.

    Raises:
        OSError: When the system does not start them.
    """
    try:
        yield
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # what can't be pickled raises any of these
        error.add_note(
            "Where processes are spawned (by default from Python 3.14), what they run is pickled: give them functions "
            "and classes of a module, no lambdas and none that are defined in a function"
        )
        raise
    except OSError as error:
        raise OSError(
            f"no more processes can be started ({error.strerror or error}); fewer num_workers or devices may help, or "
            "more of what `ulimit -n` (open files) and `ulimit -u` (processes) limit"
        ) from error


def _end_with_parent() -> None:
    """End this process when its parent is gone, whatever it is doing.

    torch itself looks for the parent between two batches only. A process that has more to send than its pipe holds
    would wait for ever, since the other workers also hold the pipe's reading end.
    """
    parent, starter = multiprocessing.parent_process(), os.getppid()
    # The starter may be a fork server, or already be gone; but forked workers are told late that their parent is dead.
    while os.getppid() == starter and (parent is None or parent.is_alive()):
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _report_unless_parent_ended(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error, but not the one of multiprocessing's thread that sends a tensor when the parent ends."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)
