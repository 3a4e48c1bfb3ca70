"""Writes a tar whose bits depend on its members only."""

import hashlib
import tarfile
from typing import BinaryIO

from clipfilter_wds.shards.tar_reader import stored_member
from clipfilter_wds.types import Member, StoredMember


class TarWriter:
    """Writes members to a tar whose bits depend on the members only.

    Args:
        file: Where to, from its beginning.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._num_bytes = file, hashlib.sha256(), 0
        # What comes next, and has not been written yet.
        self._window, self._start, self._stop = b"", 0, 0

    def add(self, member: Member) -> None:
        """Append a member under its own name, with fixed time, owner and mode."""
        self.copy(stored_member(member.name, member.data))

    def copy(self, member: StoredMember) -> None:
        """Append a member as it stands in another tar."""
        # Neighbours are written at once: where all are kept, that is a stretch of the tar that has dozens.
        if member.window is not self._window or member.start != self._stop:
            self._write_stretch()
            self._window, self._start = member.window, member.start
        self._stop = member.stop

    def finish(self) -> str:
        """Write the end of the archive; the SHA-256 of all that was written, in hex."""
        self._write_stretch()
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._num_bytes % tarfile.RECORDSIZE))
        return self._digest.hexdigest()

    def _write_stretch(self) -> None:
        self._write(memoryview(self._window)[self._start : self._stop])

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._num_bytes += len(data)
