"""Writes files that are whole or absent."""

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
#: Shards are written in larger pieces, which bypass the buffer.
_BUFFER_BYTES = 1 << 14
_EARLY_BYTES = 1 << 23


@contextmanager
def publish(path: AnyPath) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at ``path`` when the block ends, whole and on disk, or not at all.

    Raises:
        OSError: When it can't be written; names ``path``.
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
    """Create a file beside ``path``, locked while its writer lives: that tells it from a leftover."""
    while True:
        temporary = path.with_name(_TEMPORARY.replace("*", f"{_stem(path)}.{uuid4().hex}"))
        file = BufferedWriter(_EarlyFile(temporary, "xb"), _BUFFER_BYTES)
        with suppress(OSError):  # some network storage has no locks; then nothing is ever taken for a leftover either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()  # another process took it for one, before it was locked


class _EarlyFile(FileIO):
    """Has the kernel write to disk while more is written, so that little is left to wait for at the end."""

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
    """Uploads the whole file at the end, so that half of it is never seen; an object store makes that atomic."""
    with TemporaryFile(buffering=_BUFFER_BYTES) as file:  # without a name: it disappears with the process
        yield cast(BinaryIO, file)
        file.flush()
        path.upload(file)


def publish_json(path: AnyPath, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with publish(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def check_writable(output: AnyPath, *, as_file: bool = False) -> None:
    """Check that files can be written to a folder, or that a file can be written, and leave nothing behind.

    A folder that is missing is made when the first file is written; here the one above it, or above that, is tried.

    Raises:
        ValueError: When it can't be written, or a folder is named where a file is meant.
    """
    if as_file and isinstance(output, Path) and output.is_dir():
        raise ValueError(f"output {str(output)!r} is a folder; name a file")
    folder = output.parent if as_file else output
    try:
        if isinstance(folder, Path):
            # Without a name: nothing is left of it, whenever the process is killed.
            with TemporaryFile(dir=_first_that_is_there(folder)):
                pass
        else:
            probe = folder / f".clipfilter-probe-{uuid4().hex}"
            with publish(probe):
                pass
            probe.unlink()
    except OSError as error:
        raise ValueError(f"can't write to output {str(output)!r}: {error.strerror or error}") from error


def _first_that_is_there(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    while True:
        try:
            folder.stat()
            return folder
        except FileNotFoundError:
            if folder.is_symlink() or folder == folder.parent:
                raise  # a link that leads nowhere is no folder, and none can be made there
            folder = folder.parent


def remove_leftovers(folder: AnyPath) -> None:
    """Delete the unfinished files that dead writers left in ``folder`` and below. Remote folders have none."""
    if not isinstance(folder, Path):
        return
    for path in folder.rglob(_TEMPORARY):
        _remove_leftover(path)


def remove_leftovers_of(path: Path) -> None:
    """Delete the unfinished files that dead writers of ``path`` left."""
    for leftover in path.parent.glob(_TEMPORARY.replace("*", f"{glob.escape(_stem(path))}.*")):
        _remove_leftover(leftover)


def _stem(path: Path) -> str:
    """The name, cut so that a temporary name made of it isn't too long."""
    return os.fsencode(path.name)[:120].decode(errors="ignore")


def _remove_leftover(path: Path) -> None:
    # Fails while its writer lives, when the writer has just finished, or where there are no locks.
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
