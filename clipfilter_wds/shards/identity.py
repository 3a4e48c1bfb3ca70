"""Tells whether a shard is the one that was scored."""

from contextlib import suppress
from functools import lru_cache

from clipfilter_wds.shards.open import open_shard, shard_identity
from clipfilter_wds.shards.tar_reader import TAR_DAMAGE, TarStream
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.types import ShardError, ShardIdentity

#: Signatures that a process remembers, so that it reads a shard's headers once.
_NUM_REMEMBERED = 1 << 16


class OtherShardError(ShardError):
    """A shard is not the one that was scored."""


def check_identity(url: str, scored: ShardIdentity, path: AnyPath, *, is_read_next: bool = False) -> ShardIdentity:
    """Check that a shard is the one that was scored.

    Another size tells that it is not. With the same size and storage version it is, and nothing is read. Where only the
    version differs, as that of a data set that was copied, the headers are read, and their signature decides. What
    has no signature was scored from a pipe, or by the first versions of this package: there the size decides alone.

    Args:
        url: The shard.
        scored: What is known of the one that was scored.
        path: Where that is written, for the message.
        is_read_next: Leave the signature to somebody who is about to read the shard to its end.

    Returns:
        What was scored, with the storage version that the shard has now, where its signature is known.

    Raises:
        OtherShardError: When it is another.
        ShardError: When it can't be reached.
    """
    if scored.num_bytes == -1 and scored.storage_version is None:
        return scored
    here = shard_identity(url)
    is_same = here.matches(scored)
    if is_same is None and not is_read_next:
        is_same = here._replace(signature=_read_signature(url, here)).matches(scored)
    if is_same is False:
        raise OtherShardError(f"it is not the shard that was scored: {_difference(here, scored)} in {str(path)!r}")
    return scored if scored.signature is None else scored._replace(storage_version=here.storage_version)


def is_scored(url: str, scored: ShardIdentity, path: AnyPath) -> bool:
    """Whether a shard is the one that was scored, as :func:`check_identity` finds.

    Raises:
        ShardError: When it can't be reached.
    """
    try:
        check_identity(url, scored, path)
    except OtherShardError:
        return False
    return True


def _difference(here: ShardIdentity, scored: ShardIdentity) -> str:
    if -1 not in (here.num_bytes, scored.num_bytes) and here.num_bytes != scored.num_bytes:
        return f"{here.num_bytes} bytes here, {scored.num_bytes}"
    return "members of other names, sizes or times here than"


@lru_cache(_NUM_REMEMBERED)
def _read_signature(url: str, here: ShardIdentity) -> str:
    """The signature of a shard of this size and version."""
    with open_shard(url) as shard:
        tar = TarStream(shard.stream, max_member_bytes=0)
        with suppress(*TAR_DAMAGE):
            for _ in tar:
                pass
    return tar.signature
