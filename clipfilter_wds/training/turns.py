"""Reads a worker's streams in batches, turn by turn."""

from collections.abc import Callable, Iterator, Sequence

from clipfilter_wds.training.batches import StreamBatch, StreamBatchBuilder
from clipfilter_wds.training.stream import PartEnd, Position, ShardFailure, StreamProgress, StreamSample

#: Position -> the rest of its epoch, as ``read_stream`` gives it.
OpenStream = Callable[[Position], Iterator[StreamSample | ShardFailure | PartEnd]]


def take_turns(readers: Sequence["StreamReader"]) -> Iterator[StreamBatch]:
    """The batches of several streams. Next comes the one with the fewest turns, of several the one of lowest number."""
    while active := [reader for reader in readers if not reader.is_over]:
        reader = min(active, key=lambda reader: (reader.progress.turns, reader.stream))
        yield from reader.turn(is_alone=len(active) == 1)


class StreamReader:
    """Reads a stream, one epoch after another. Its shard stays open between two turns; no samples are held.

    Args:
        stream: Its number.
        progress: How far it is.
        open_stream: Reads it.
        builder: Makes batches of its samples; other streams of the worker use it between two turns.
        last_epoch: The epoch after which it is over; None for never.
        in_windows: Whether a turn is a window, else a batch.
    """

    def __init__(
        self,
        stream: int,
        progress: StreamProgress,
        open_stream: OpenStream,
        builder: StreamBatchBuilder,
        *,
        last_epoch: int | None,
        in_windows: bool,
    ) -> None:
        self.stream, self.progress = stream, progress
        self._open_stream, self._builder = open_stream, builder
        self._last_epoch, self._in_windows = last_epoch, in_windows
        self._items = open_stream(progress.position)

    @property
    def is_over(self) -> bool:
        """Whether it has nothing more to give."""
        return self._last_epoch is not None and self.progress.position.epoch > self._last_epoch

    def turn(self, *, is_alone: bool) -> Iterator[StreamBatch]:
        """The batches of its turn; those of the rest of the epoch where no other stream waits for its own.

        Where the turn is over, so is the batch.
        """
        position, turns = self.progress.position, self.progress.turns
        for item in self._items:
            if isinstance(item, PartEnd):
                self._builder.ends.append(item)
                continue
            if isinstance(item, ShardFailure):
                self._builder.failures.append((item.url, item.why))
            else:
                self._builder.add(item)
            position = item.after
            is_turn_over = position.offset == 0 if self._in_windows else self._builder.is_full
            turns += is_turn_over
            if self._builder.is_full or (is_turn_over and not is_alone):
                yield self._build(position, turns)
            if is_turn_over and not is_alone:
                return
        # The epoch's last batch says that the epoch is over, even when it holds no sample.
        following = Position(epoch=position.epoch + 1)
        yield self._build(following, turns + 1)
        self._items = self._open_stream(following)

    def _build(self, position: Position, turns: int) -> StreamBatch:
        self.progress = StreamProgress(position, turns)
        return self._builder.build(self.stream, self.progress)
