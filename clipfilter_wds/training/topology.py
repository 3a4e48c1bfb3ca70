"""Deals the streams that an epoch is split into to ranks and workers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Which streams this rank's workers read, of how many there are.

    Attributes:
        rank: This rank.
        world_size: How many ranks there are.
        num_workers: Workers of each rank.
        num_streams: Streams of an epoch.
        num_groups: Groups of streams that have the same work, one for each rank when the epoch was split. Of several,
            they take turns with the shards, so that over the epochs each rank reads all of them.
    """

    rank: int
    world_size: int
    num_workers: int
    num_streams: int
    num_groups: int = 1

    @property
    def streams(self) -> range:
        """The streams of this rank; none where there are fewer streams than ranks."""
        return range(self.rank, self.num_streams, self.world_size)

    def streams_of(self, worker: int) -> range:
        """The streams that a worker of this rank reads."""
        return self.streams[worker :: self.num_workers]

    @property
    def split(self) -> tuple[int, int]:
        """How an epoch is split, whoever reads it."""
        return self.num_streams, self.num_groups

    def is_same_rank(self, other: "Topology") -> bool:
        """Whether it has the same streams, whatever the number of workers."""
        return (self.rank, self.world_size, self.split) == (other.rank, other.world_size, other.split)

    @property
    def num_passes_for_all(self) -> int:
        """In how many epochs this rank reads all that it ever will."""
        if self.num_groups == 1:
            return 1
        streams = [*self.streams]
        following = [*streams[1:], *(stream + self.num_streams for stream in streams[:1])]
        return max((after - stream for stream, after in zip(streams, following, strict=True)), default=0)
