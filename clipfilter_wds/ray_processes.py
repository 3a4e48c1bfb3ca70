"""The processes of a Ray that was started here: gone soon, whenever they are to end."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def ended_when_interrupted() -> Iterator[None]:
    """Kill what is started in the block, with all that it has started itself, when Ctrl-C strikes there.

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

    What scales a cluster is killed first. It has nothing to do on this machine, and when Ray ends it, after the others,
    it tries for a second to tell these.
    """
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if any("/autoscaler/" in word for word in child.cmdline()):
                child.kill()
    ray.shutdown()
