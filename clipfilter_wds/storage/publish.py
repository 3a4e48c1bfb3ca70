"""Files that are whole or absent, and tars that hold members as they were."""

import fcntl
import glob
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast
from uuid import uuid4

from clipfilter_wds.storage.paths import AnyPath, RemotePath

_TEMPORARY = ".*.clipfilter-tmp"
#: Shards are written in larger pieces, which are not copied through the buffer.
_BUFFER_BYTES = 1 << 14
_EARLY_BYTES = 1 << 23


@contextmanager
def publish(path: AnyPath) -> Iterator[BinaryIO]:
    """A file to write that appears at ``path`` when the block ends, whole and stored, or not at all.

    Raises:
        OSError: When it can't be written; it names ``path``.
    """
    with _publish_local(path) if isinstance(path, Path) else _publish_remote(path) as file:
        yield file


@contextmanager
def _publish_local(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, file = _create_temporary(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error  # a full disk names no file
        raise
    _sync_folder(path.parent)


def _create_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A file beside ``path``, locked as long as its writer lives: how others tell it from a leftover."""
    while True:
        temporary = path.with_name(_TEMPORARY.replace("*", f"{_stem(path)}.{uuid4().hex}"))
        file = BufferedWriter(_EarlyFile(temporary, "xb"), _BUFFER_BYTES)
        with suppress(OSError):  # some network storage has no locks; then nobody takes anything for a leftover either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()  # it was taken for one before it could be locked


class _EarlyFile(FileIO):
    """Has the system store what was written while more is written, so that little is left to wait for at the end."""

    _num_bytes = _num_early = 0

    def write(self, data: Any) -> int:
        num_bytes = super().write(data)
        self._num_bytes += num_bytes
        if self._num_bytes - self._num_early >= _EARLY_BYTES and hasattr(os, "posix_fadvise"):  # macOS has none
            with suppress(OSError):  # it is advice
                os.posix_fadvise(
                    self.fileno(), self._num_early, self._num_bytes - self._num_early, os.POSIX_FADV_DONTNEED
                )
            self._num_early = self._num_bytes
        return num_bytes


@contextmanager
def _publish_remote(path: RemotePath) -> Iterator[BinaryIO]:
    """Uploads the whole file at the end, so that nothing half-written can be seen; an object store makes it atomic."""
    with TemporaryFile(buffering=_BUFFER_BYTES) as file:  # without a name: it is gone when the process is
        yield cast(BinaryIO, file)
        file.flush()
        path.upload(file)


def publish_json(path: AnyPath, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with publish(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def remove_leftovers(folder: AnyPath) -> None:
    """Delete the unfinished files of writers that are no more, in ``folder`` and below. Remote folders have none."""
    if not isinstance(folder, Path):
        return
    for path in folder.rglob(_TEMPORARY):
        _remove_leftover(path)


def remove_leftovers_of(path: Path) -> None:
    """Delete the unfinished files of writers of ``path`` that are no more."""
    for leftover in path.parent.glob(_TEMPORARY.replace("*", f"{glob.escape(_stem(path))}.*")):
        _remove_leftover(leftover)


def _stem(path: Path) -> str:
    """As much of the name as leaves room for the rest of a temporary one."""
    return path.name.encode()[:120].decode(errors="ignore")


def _remove_leftover(path: Path) -> None:
    # Refused while its writer lives, when it has just finished, or where there are no locks to tell.
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
