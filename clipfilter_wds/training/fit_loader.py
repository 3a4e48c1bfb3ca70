"""Runs the training loader under Lightning's fit loop, which says when an epoch begins and what was trained on."""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
from torch import distributed

from clipfilter_wds.training.loader import ClipFilterLoader


class FitLoader:
    """The training loader as the fit loop iterates it.

    The fit loop may make two iterators for one epoch, so an epoch begins where it began before. And it counts an epoch
    that ``max_steps`` or ``should_stop`` cut off, or in which it trains nothing; a resumed run gives the rest of the
    former as its next one, so the loader counts its own. With ``overfit_batches`` all epochs are the first.

    Args:
        loader: The training loader.
        trainer: Runs the fit loop.
        resumed: What :meth:`position` was in the checkpoint to resume from, if there is one.

    Raises:
        ValueError: When this loader can't be resumed from that.
    """

    def __init__(self, loader: ClipFilterLoader, trainer: L.Trainer, resumed: Mapping[str, Any] | None) -> None:
        self.loader, self.trainer, self._resumed = loader, trainer, resumed
        self._epoch = self._counted = -1  # the loader's, and how many the fit loop had counted when it began
        self._begin: Mapping[str, Any] = {"batches": 0}
        self._num_before = 0  # batches that were trained before the loader's epoch
        self._num_batches: int | None = None  # of the loader's epoch, once that has ended
        self._is_begun_again = False  # after its end, by a CombinedLoader or by who looks at batches
        if resumed is not None:
            loader.load_state_dict(resumed["ranks"])

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Not trainer.current_epoch, which lags behind when a run resumes at the end of an epoch.
        counted: int = self._fit_loop.epoch_progress.current.processed
        if counted != self._counted:
            self._start_epoch(counted)
        self.loader.load_state_dict(self._begin)
        if self._num_batches == self._begin["batches"]:  # saved when it was through
            return iter(())
        self._is_begun_again = self._num_batches is not None
        return self._batches(iter(self.loader))

    def _batches(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        num_batches = self._begin["batches"]
        for batch in batches:
            num_batches += 1
            yield batch
        self._num_batches = num_batches

    def _start_epoch(self, counted: int) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self._epoch = resumed["epoch"]
        elif self._epoch < 0:
            self._epoch = counted
        elif self._is_begun:  # resumed at an epoch's end, the fit loop may count another one without a batch
            self._epoch += counted - self._counted
        if resumed is None or not resumed["within_epoch"]:
            self._set_epoch()
        self._counted, self._begin = counted, self.loader.state_dict()
        self._num_before = self._num_trained - self._begin["batches"]
        self._num_batches = self._begin["batches"] if resumed is not None and resumed["is_through"] else None
        self._is_begun_again = False

    @property
    def _num_given(self) -> int:
        """Batches of the loader's epoch that were trained; the fit loop fetches one batch ahead."""
        return self._num_trained - self._num_before - self._num_beyond

    @property
    def _num_beyond(self) -> int:
        """Batches of the fit loop after the end of the loader's epoch, where a CombinedLoader has more of another."""
        return max(0, self._num_trained - self._num_before - self._num_batches) if self._num_batches is not None else 0

    @property
    def _is_through(self) -> bool:
        """Whether all batches of the loader's epoch were trained."""
        return self._num_given == self._num_batches

    @property
    def _is_begun(self) -> bool:
        """Whether the fit loop has trained on a batch of the loader's epoch, or found none."""
        return self._num_given > self._begin["batches"] or self._is_through

    def _set_epoch(self) -> None:
        if self.trainer.overfit_batches:  # type: ignore[attr-defined]  # set by a connector
            self.loader.set_epoch(1)  # and so leave a position within the first epoch, where a run resumed
            self.loader.set_epoch(0)
        else:
            self.loader.set_epoch(self._epoch)

    def position(self) -> dict[str, Any]:
        """Where all ranks are, after the batch that was trained last.

        Raises:
            ValueError: When a batch was given twice in an epoch.
        """
        if self._is_begun_again and self._num_beyond:
            raise ValueError(
                "the Trainer has begun the filtered batches again within an epoch, as a CombinedLoader of the mode "
                "'max_size_cycle' does with the shorter of its loaders, and can't resume there. Make it "
                "CombinedLoader(..., mode='min_size'), or let the Trainer save no checkpoints: "
                "Trainer(enable_checkpointing=False)"
            )
        mine = self.loader.state_dict(after=self._num_given)
        # Only rank zero's checkpoint is written, so it holds the states of all.
        ranks: list[Any] = [mine]
        if self.trainer.world_size > 1:
            ranks = [None] * self.trainer.world_size
            distributed.all_gather_object(ranks, mine)
        within_epoch = self._fit_loop.epoch_progress.current.processed == self._counted
        is_through = self._is_through or (self._is_begun and self._is_cut_off)
        return {
            "epoch": self._epoch + (is_through and not within_epoch),
            "within_epoch": within_epoch,
            "is_through": is_through and within_epoch,
            "ranks": ranks,
        }

    @property
    def _is_cut_off(self) -> bool:
        """Whether the fit loop trains on no more batches of its epoch, as by ``limit_train_batches``."""
        batches = self._fit_loop.epoch_loop.batch_progress
        num_trained: int = batches.current.processed
        if num_trained != batches.current.ready:  # the one that may be the last is still to be trained on
            return False
        return bool(batches.is_last_batch) or num_trained == self.trainer.num_training_batches

    @property
    def _num_trained(self) -> int:
        """Batches since training began; those of the epoch may or may not start from 0 in a resumed run."""
        num_trained: int = self._fit_loop.epoch_loop.batch_progress.total.processed
        return num_trained

    @property
    def _fit_loop(self) -> Any:  # whose progress Lightning types too widely
        return self.trainer.fit_loop

    def state_dict(self) -> dict[str, Any]:
        """Tells Lightning that the loader can be resumed; the data module holds the state.

        Lightning restores a loader's own state when it stopped within an epoch, but not at the end of one.
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Called when Lightning resumes within an epoch."""
        # Saved with an epoch's last batch and of unknown length, the flag would end every later epoch before it begins.
        self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False
