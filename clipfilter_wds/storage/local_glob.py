"""Finds the paths of this machine that a glob matches."""

import errno
import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

#: Errors of what is no folder, or none any more.
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def local_matches(pattern: Path) -> list[str]:
    """The absolute paths that match, sorted: links that lead nowhere and hidden files too.

    ``**`` stands for any number of folders, and follows no links, which may lead in circles. The standard library
    passes over folders that can't be listed; here that is an error, since shards would be missed.

    Raises:
        ValueError: When a folder can't be listed; it names the folder.
    """
    found = {pattern.anchor}
    parts = list(pattern.parts[1:] if pattern.anchor else pattern.parts)
    for part in [*parts, "*"] if parts[-1] == "**" else parts:
        found = {match for folder in found for match in _step(folder, part)}
    return sorted(str(Path(path).absolute()) for path in found)


def _step(folder: str, part: str) -> Iterator[str]:
    """What a part of a pattern matches in a folder; an empty name is the working folder."""
    if part == "**":
        yield from (below for below, _, _ in os.walk(folder or ".", onerror=_complain))
    elif glob.has_magic(part):
        yield from (os.path.join(folder, name) for name in _names_in(folder) if fnmatchcase(name, part))  # noqa: PTH118
    elif os.path.lexists(path := os.path.join(folder, part)):  # noqa: PTH118
        yield path


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")  # noqa: PTH208
    except OSError as error:
        _complain(error)
        return []


def _complain(error: OSError) -> None:
    if error.errno not in _NO_FOLDER:
        raise ValueError(f"can't list {error.filename!r}: {error.strerror}") from error
