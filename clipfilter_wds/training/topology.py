"""Splits an epoch into streams, and deals the streams to ranks and workers."""

from dataclasses import dataclass

#: By default, an epoch is not split into more streams than this, unless there are more workers.
_MAX_STREAMS = 96
#: How many extra reads of shards that several streams share are put up with, as a part of all shards.
_MAX_EXTRA_READS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Which streams this rank's workers read, of how many there are.

    Attributes:
        rank: This rank.
        world_size: How many ranks there are.
        num_workers: Workers of each rank.
        num_streams: Streams of an epoch.
        rotates: Whether the streams take turns with the shards, so that over the epochs each rank reads all of them.
    """

    rank: int
    world_size: int
    num_workers: int
    num_streams: int
    rotates: bool = False

    @property
    def streams(self) -> range:
        """The streams of this rank; none where there are fewer streams than ranks."""
        return range(self.rank, self.num_streams, self.world_size)

    def streams_of(self, worker: int) -> range:
        """The streams that a worker of this rank reads."""
        return self.streams[worker :: self.num_workers]

    @property
    def split(self) -> tuple[int, bool]:
        """How an epoch is split, whoever reads it."""
        return self.num_streams, self.rotates

    def is_same_rank(self, other: "Topology") -> bool:
        """Whether it has the same streams, whatever the number of workers."""
        return (self.rank, self.world_size, self.split) == (other.rank, other.world_size, other.split)

    @property
    def num_passes_for_all(self) -> int:
        """In how many epochs this rank reads all that it ever will."""
        if not self.rotates:
            return 1
        streams = [*self.streams]
        following = [*streams[1:], *(stream + self.num_streams for stream in streams[:1])]
        return max((after - stream for stream, after in zip(streams, following, strict=True)), default=0)


def default_num_streams(num_shards: int, num_readers: int) -> int:
    """How many streams an epoch is split into, where the user does not say.

    The smallest multiple of the number of readers, so that all have the same work, with few extra reads of shared
    shards; where there is none, the multiple with the fewest.

    Args:
        num_shards: Shards of the epoch.
        num_readers: Workers of all ranks together.
    """
    multiples = range(num_readers, max(num_readers, _MAX_STREAMS) + 1, num_readers)
    extra = {num_streams: num_extra_reads(num_shards, num_streams) for num_streams in multiples}
    few = [num_streams for num_streams in multiples if extra[num_streams] <= _MAX_EXTRA_READS * num_shards]
    return few[0] if few else min(multiples, key=lambda num_streams: (extra[num_streams], num_streams))


def num_extra_reads(num_shards: int, num_streams: int) -> int:
    """How many more than once each shards are opened in an epoch, as several streams share some of them."""
    num_shared = num_shards % num_streams
    return num_streams - num_shared if num_shared else 0
