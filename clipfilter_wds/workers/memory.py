"""Tells how much memory is free, and refuses what does not fit."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: Where a container finds its own limits: limit, use, and the name in ``memory.stat`` of what can be had back.
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def check_fits(num_bytes: int, what: str, *, root: Path = Path("/")) -> None:
    """Refuse what takes more memory than is free.

    Args:
        num_bytes: How much it takes.
        what: What takes it, and how it could take less; begins the message.
        root: Where the system's files are.

    Raises:
        ValueError: With the number of bytes that are missing.
    """
    free = min(_free_bytes(root), default=None)
    if free is not None and num_bytes > free:
        raise ValueError(f"{what}: that is {_gib(num_bytes)}, and {_gib(free)} are free, {_gib(num_bytes - free)} less")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"


def _free_bytes(root: Path) -> Iterator[int]:
    """What the machine has free, and what the limit of this container leaves."""
    with suppress(OSError, KeyError, ValueError):
        yield _numbers(root / "proc/meminfo", ":")["MemAvailable"] << 10
    for limit, used, reclaimable in _CGROUPS:
        folder = root / "sys/fs/cgroup"
        with suppress(OSError, KeyError, ValueError):
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            yield most - now + _numbers((folder / used).with_name("memory.stat"))[reclaimable]


def _numbers(path: Path, separator: str = "") -> dict[str, int]:
    """The lines of a file that hold a name and a number."""
    words = (line.replace(separator, " ", 1).split() if separator else line.split() for line in path.open())
    return {name: int(number) for name, number, *_ in words}
