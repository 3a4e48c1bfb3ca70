"""Writes tars whose bytes depend on their members only."""

import hashlib
import tarfile
from typing import BinaryIO

from clipfilter_wds.shards.tar_reader import stored_member
from clipfilter_wds.types import Member, StoredMember


class TarWriter:
    """Writes members to a tar. The same members in the same order give the same bytes.

    Args:
        file: The open file, which the archive begins.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._num_bytes = file, hashlib.sha256(), 0
        # What is to be written next: adjacent members that lie in one window.
        self._window, self._start, self._stop = b"", 0, 0

    def add(self, member: Member) -> None:
        """Append a member with a new header that has a fixed time, owner and mode."""
        self.copy(stored_member(member.name, member.data))

    def copy(self, member: StoredMember) -> None:
        """Append a member as it is stored in another tar, headers included."""
        # Adjacent members are written at once; where all are kept, that is dozens.
        if member.window is not self._window or member.start != self._stop:
            self._write_stretch()
            self._window, self._start = member.window, member.start
        self._stop = member.stop

    def finish(self) -> str:
        """Write the end of the archive; the SHA-256 of the whole archive, in hex."""
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
