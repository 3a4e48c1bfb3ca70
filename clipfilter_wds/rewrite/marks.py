"""What an output holds already."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from clipfilter_wds.rewrite.outputs import Marked
from clipfilter_wds.rewrite.tally import ShardStats
from clipfilter_wds.scores import Fingerprint
from clipfilter_wds.types import ShardError

#: Marks that are read at once: each takes a storage a few round trips, and a run may have a million.
_NUM_READERS = 32
_NUM_AHEAD = 10_000

AnyOutput = TypeVar("AnyOutput", bound=Marked)


def read_marks(
    outputs: Sequence[AnyOutput], fingerprint: Fingerprint
) -> Iterator[tuple[AnyOutput, ShardStats | ShardError | None]]:
    """Per shard, in order: what was committed for it, None if nothing was, or why it can't be reached.

    Raises:
        ValueError: As :meth:`~clipfilter_wds.rewrite.outputs.Marked.committed`.
    """

    def read(output: AnyOutput) -> ShardStats | ShardError | None:
        try:
            return output.committed(fingerprint)
        except ShardError as error:
            return error

    with ThreadPoolExecutor(max_workers=_NUM_READERS, thread_name_prefix="clipfilter-marks") as pool:
        for start in range(0, len(outputs), _NUM_AHEAD):
            some = outputs[start : start + _NUM_AHEAD]
            yield from zip(some, pool.map(read, some), strict=True)
