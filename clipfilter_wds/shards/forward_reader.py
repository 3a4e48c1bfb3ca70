"""Reads a stream that can't seek back, as tarfile needs it."""

import tarfile
from io import BufferedIOBase

BLOCK = tarfile.BLOCKSIZE
#: A block of zeros; two of them end an archive.
END_MARK = bytes(BLOCK)
READ_BYTES = 1 << 18
#: What headers hold beside 512 bytes (a long name, times, holes) is no longer.
MAX_HEADER_BYTES = 1 << 20


class ForwardReader:
    """The methods of a file that tarfile needs, on a stream that can't seek back.

    Keeps what was read since the last seek, so that headers can be read once more.

    Args:
        stream: From its beginning.

    Attributes:
        limit: Bytes that can be read between two seeks.
        window: A part of the stream.
        at: The position in ``window``.
        at_end_mark: Whether the last thing read is a block of zeros.
        was_short: Whether the last thing read ended with the stream.
    """

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream, self.limit = stream, MAX_HEADER_BYTES
        # A part of the stream, its position in the stream, and positions within it.
        self.window, self._base, self._held, self.at = b"", 0, 0, 0
        self.at_end_mark = self.was_short = False

    def tell(self) -> int:
        """The position in the stream."""
        return self._base + self.at

    def seek(self, position: int) -> None:
        """Skip forward to a position, or to the end of the stream if that comes first."""
        at = position - self._base
        if self.at <= at <= len(self.window):
            self.at = self._held = at
            return
        if at < self.at:
            raise tarfile.ReadError("a member has a negative size")
        while at > len(self.window) and (piece := self._stream.read1(READ_BYTES)):
            at -= len(self.window)
            self._base += len(self.window)
            self.window = piece
        self.at = self._held = min(at, len(self.window))

    @property
    def since_seek(self) -> bytes:
        """All that was read since the last seek."""
        return self.window[self._held : self.at]

    def show(self, start: int, stop: int) -> tuple[bytes, int]:
        """A window that holds the stream between two positions, and where in it the first is. Does not move.

        The first position must not lie before the last seek. The window is shorter where the stream ends earlier.
        """
        self.have(stop - self.tell())
        return self.window, start - self._base

    def read(self, size: int) -> bytes:
        """Read what comes next; less than ``size`` bytes at the end of the stream.

        Raises:
            tarfile.ReadError: When that is less than none, or more than the limit allows since the last seek.
        """
        if not 0 <= size <= self.limit - (self.at - self._held):
            raise tarfile.ReadError(f"a header declares {size} bytes")
        self.have(size)
        data = self.window[self.at : self.at + size]
        self.at += len(data)
        self.was_short = len(data) < size
        self.at_end_mark = data == END_MARK
        return data

    def take_block(self) -> bytes:
        """Read the next block, or what is left of the stream, and forget what lies before it."""
        self._held = self.at
        self.have(BLOCK)
        block = self.window[self.at : self.at + BLOCK]
        self.at += len(block)
        return block

    def skip_zero_blocks(self) -> int:
        """Move behind the blocks of zeros that come next; how many there are, the last of the stream may be short."""
        num_blocks = 0
        while True:
            self._held = self.at
            self.have(READ_BYTES)
            piece = self.window[self.at : self.at + READ_BYTES]
            num_zeros = len(piece) - len(piece.lstrip(b"\0"))
            is_last = num_zeros == len(piece) < READ_BYTES
            skipped = num_zeros if is_last else num_zeros - num_zeros % BLOCK
            self.at += skipped
            num_blocks += -(-skipped // BLOCK)
            if skipped < READ_BYTES:
                return num_blocks

    def have(self, size: int) -> None:
        """Fill the window with this many bytes from here on, or with the rest of the stream. Does not move."""
        if self.at + size <= len(self.window):
            return
        # A header may declare far more bytes than there are, so memory is allocated only for what arrives.
        size -= len(self.window) - self.at
        self._forget(self._held)
        pieces = [self.window]
        while size > 0 and (piece := self._stream.read1(READ_BYTES)):
            pieces.append(piece)
            size -= len(piece)
        self.window = b"".join(pieces)

    def let_go(self) -> None:
        """Keep nothing of what was read."""
        self._forget(self.at)

    def _forget(self, num_bytes: int) -> None:
        self._base += num_bytes
        self.at -= num_bytes
        self._held = 0
        self.window = self.window[num_bytes:]
