"""Connects to a Ray cluster, or starts Ray on this machine and shuts it down."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from clipfilter_wds.world import ray_address


def import_ray() -> Any:
    """Ray.

    Raises:
        ValueError: When it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(
            "engine ray needs a package that is not installed: pip install 'clipfilter-wds[ray]'"
        ) from None
    return ray


def connect(ray: Any, address: str | None) -> bool:
    """Connect to a running cluster, or start Ray here; whether that was done, and not before by another.

    Without an address Ray itself would look for any cluster on this machine first, such as the one that another run has
    started for itself and takes away at its end.

    Raises:
        ValueError: When there is no cluster at this address.
    """
    if ray.is_initialized():
        return False
    try:
        host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
        if colon:  # Ray itself would end the process after a minute without an answer
            socket.create_connection((host, int(port)), timeout=10).close()
        with _killed_when_interrupted():
            ray.init(
                address=address or ray_address() or "local",
                logging_level="warning",
                log_to_driver=False,
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no Ray cluster at {address!r}: {error}") from error
    return True


@contextmanager
def _killed_when_interrupted() -> Iterator[None]:
    """Kill the processes that are started in the block, and theirs, when Ctrl-C strikes there.

    Ray can be shut down only when all of it is up. Parts of it that are left alone stay for another minute.
    """
    import psutil

    before = set(psutil.Process().children())
    try:
        yield
    except KeyboardInterrupt:
        started = set(psutil.Process().children()) - before
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.suspend()  # so that it starts no more
                for process in child.children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                child.kill()
        raise


def shut_down(ray: Any) -> None:
    """Shut Ray down, in a third of a second.

    The autoscaler is killed first. It has nothing to do on this machine, and Ray would end it last, when it tries for a
    second to tell the others.
    """
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if any("/autoscaler/" in word for word in child.cmdline()):
                child.kill()
    ray.shutdown()


def num_assigned_cpus() -> int:
    """How many CPUs the actor has that this runs in."""
    return int(import_ray().get_runtime_context().get_assigned_resources().get("CPU", 1))
