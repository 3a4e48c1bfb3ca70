"""Runs one epoch of a loader: its training batches, made in workers and a thread, and how far they are."""

from typing import Any

from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.training.packer import Packed, Packer
from clipfilter_wds.training.source import BatchSource
from clipfilter_wds.training.state import LoaderState, Progress
from clipfilter_wds.world import World


class Epoch:
    """One iteration of a loader, from a state on.

    Args:
        source: Gives scored batches.
        config: The loader's.
        world: This rank among all.
        begin: Where the iteration begins.

    Attributes:
        world: This rank among all.
        begun_at: Where the iteration began.
    """

    def __init__(self, source: BatchSource, config: LoaderConfig, world: World, begin: LoaderState) -> None:
        self.world, self.begun_at = world, begin
        self._packer = Packer(config, begin, has_scores=source.has_scores)
        self._batches = source.packed(self._packer)
        self._last: Packed | None = None

    def next_batch(self) -> dict[str, Any] | None:
        """The next training batch, None when the epoch has no more."""
        self._last = next(self._batches, self._last)
        assert self._last is not None, "packing ends with a word about the end"
        return self._last.batch

    @property
    def progress(self) -> Progress:
        """How far the stream was when the last batch was packed."""
        return self.begun_at.progress if self._last is None else self._last.progress

    @property
    def num_seen(self) -> int:
        """Samples of this iteration that had been scored by then."""
        return 0 if self._last is None else self._last.num_seen

    @property
    def num_kept(self) -> int:
        """How many of them are kept."""
        return 0 if self._last is None else self._last.num_kept

    @property
    def num_ready(self) -> int:
        """How many of these were in no batch yet."""
        return 0 if self._last is None else self._last.num_ready

    @property
    def state(self) -> LoaderState:
        """The loader's state after the last batch."""
        return self.begun_at if self._last is None else self._last.state

    def starved(self, what: str) -> StarvationError:
        """The error to raise when nothing is kept, with what is known of the scores."""
        return self._packer.watch.starved(what)

    def close(self) -> None:
        """Stop workers and thread."""
        self._batches.close()
