"""Tells what stands behind the members of an archive: its end, another archive, or the rest of a damaged one."""

import re
import tarfile
from enum import Enum, auto

from clipfilter_wds.shards.forward_reader import BLOCK, END_MARK, ForwardReader
from clipfilter_wds.shards.open import is_compressed
from clipfilter_wds.types import ShardError

_END_BLOCKS = 2
#: A header's checksum, where most blocks that are no header can be told from one at once.
_CHECKSUM = re.compile(rb"[ 0-7]{6,7}[\0 ]")


class Behind(Enum):
    """What stands behind the members of an archive."""

    NOTHING = auto()
    ARCHIVE = auto()
    DAMAGE = auto()


def look_behind(reader: ForwardReader) -> Behind:
    """Move to what stands behind an archive's last member.

    Two blocks of zeros end an archive, and one does where nothing follows it. What follows and begins as an archive is
    another one, as ``cat a.tar b.tar`` makes them. Other bytes mean nothing where they go on to the end. Where a
    header or an end mark lies among them, the zeros are a hole, such as a crash leaves, in the archive that was read.

    Raises:
        ShardError: When a compressed archive follows one that is not.
    """
    if not reader.at_end_mark:
        return Behind.DAMAGE
    num_blocks = 1 + reader.skip_zero_blocks()
    reader.have(BLOCK)
    block = reader.window[reader.at : reader.at + BLOCK]
    if not block:
        return Behind.NOTHING
    if num_blocks < _END_BLOCKS:
        return Behind.DAMAGE
    if is_compressed(block):
        raise ShardError("a compressed file stands behind the end of its archive; join shards that are packed alike")
    if _is_header(block):
        return Behind.ARCHIVE
    return Behind.DAMAGE if _holds_tar(reader) else Behind.NOTHING


def _holds_tar(reader: ForwardReader) -> bool:
    """Whether the rest of the stream has a header, or ends in an end mark."""
    num_blocks = 0
    while block := reader.take_block():
        if _is_header(block):
            return True
        num_blocks = num_blocks + 1 if block == END_MARK else 0
    return num_blocks >= _END_BLOCKS


def _is_header(block: bytes) -> bool:
    if not _CHECKSUM.match(block, 148):
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
