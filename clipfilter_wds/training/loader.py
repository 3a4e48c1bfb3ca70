"""Gives training its batches: epoch by epoch, in step with the other ranks, from any saved state on."""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from clipfilter_wds.options import changed_options, check_options, check_whole_number, refuse_name
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.metadata import DTYPES
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.epoch import Epoch, training_batches
from clipfilter_wds.training.evaluation import evaluation_batches
from clipfilter_wds.training.precomputed import FolderLookup, config_for
from clipfilter_wds.training.record import Recorder, RecordLookup
from clipfilter_wds.training.record_folder import RecordFolder
from clipfilter_wds.training.resume import check_settings, check_streams, settings_of, share_out, states_in
from clipfilter_wds.training.source import BatchSource
from clipfilter_wds.training.state import LoaderState, Progress
from clipfilter_wds.training.topology import Topology
from clipfilter_wds.types import FilterStats
from clipfilter_wds.world import Agreement, World

if TYPE_CHECKING:
    from clipfilter_wds.models.scorer import ClipScorer

_STATE_VERSION = 2
#: States kept of the batches handed out last. Lightning fetches one batch ahead of the one that it trains on, and its
#: hooks may look at some more, in an iteration of their own.
_NUM_REMEMBERED = 16


class ClipFilterLoader:
    """Batches of the pairs whose caption describes the image, to train on or to evaluate.

    A batch is a dict: ``image`` and ``text`` (what the dataset's transforms made of them, collated), ``score`` (raw
    cosine, float32 ``[batch_size]``), ``__key__`` and ``__url__`` (lists of str); all on the CPU. Workers read and
    decode, a thread scores a few batches ahead, and training gets what is kept.

    Args:
        dataset: A ``ClipWebDataset``; or any iterable of dicts that hold ``pixel_values``, ``input_ids`` and ``reason``
            as ``scorer.preprocess`` makes them, whose other columns are passed on (such a loader can't be resumed).
        scorer: The model; or a ``ScoreFolder``, whose scores decide before an image is
            decoded, with no model at all, and give the batches that a model gives. None keeps everything and adds no
            scores, for loaders that are sometimes filtered.
        world: This rank among all; None takes it from ``torch.distributed`` or the environment.
        options: As :class:`LoaderConfig`.

    Raises:
        ValueError: From :class:`LoaderConfig`; when the scorer, or score table, does not fit the dataset; and when an
            option says how to read shards, and the dataset is another loader.
        TypeError: When there is no such option, or the scorer is a name.
    """

    def __init__(
        self,
        dataset: ClipWebDataset | Iterable[Mapping[str, Any]],
        scorer: "ClipScorer | ScoreFolder | None",
        *,
        world: World | None = None,
        **options: Any,
    ) -> None:
        refuse_name("scorer", scorer, "a ClipScorer of that model, or a ScoreFolder of score tables")
        self.dataset = dataset
        self.table = scorer if isinstance(scorer, ScoreFolder) else None
        self.scorer = None if isinstance(scorer, ScoreFolder) else scorer
        check_options(type(self).__name__, options, LoaderConfig)
        self.config = config_for(self.table, options)
        if scorer is None and self.config.threshold is not None:
            raise ValueError(f"threshold is {self.config.threshold}, but there is no scorer; pass threshold=None")
        self.world = world or getattr(dataset, "world", None)
        #: Batches that the ranks had ready when the last epoch ended and did not hand out (``end="sync"``).
        self.left_over = 0
        self._agreement: Agreement | None = None
        self._asked_epoch: int = getattr(dataset, "epoch", 0)
        self._source = self._open_source()
        self._epoch: Epoch | None = None
        self._next = self._last = self._start_of(self._asked_epoch)
        self._remembered: deque[LoaderState] = deque([self._last], maxlen=_NUM_REMEMBERED)

    def __repr__(self) -> str:
        dataset = repr(self.dataset) if isinstance(self.dataset, ClipWebDataset) else type(self.dataset).__name__
        scores = str(self.table.folder) if self.table is not None else self.scorer and self.scorer.model_name
        options = changed_options(self.config, always=("threshold", "batch_size"))
        return f"ClipFilterLoader({dataset}, {scores!r}, {options}, stats={self.stats})"

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: all but what belongs to this process, or to an iteration that is not over."""
        return {**self.__dict__, "_agreement": None, "_epoch": None, "_remembered": self._remembered.copy()}

    def _open_source(self) -> BatchSource:
        """What gives scored batches, with the scores that are known beforehand."""
        dataset, scorer, table, config = self.dataset, self.scorer, self.table, self.config
        if config.record is not None and scorer is None:
            raise ValueError(f"record is {str(config.record)!r}, but there is no scorer whose scores could be recorded")
        if not isinstance(dataset, ClipWebDataset):
            if table is not None or config.record is not None:
                raise ValueError("scores are kept by shard: a score table, or record, goes with a ClipWebDataset only")
            config.check_suits_other_loaders()
            return BatchSource(dataset, config, scorer)
        if table is not None:
            lookup = FolderLookup.of(
                table, dataset.urls, dataset.layout, config.resolved_threshold, config.score_columns
            )
            view = dataset.preprocess.view if dataset.preprocess else ImageView.from_fingerprint(table.fingerprint)
            return BatchSource(dataset, config, scorer, lookup=lookup, view=view, kind=table.kind)
        if dataset.preprocess is None:
            raise ValueError("the dataset has no preprocess: give it the scorer's, or the loader a ScoreFolder")
        if config.record is None or scorer is None:
            return BatchSource(dataset, config, scorer)
        fingerprint = {**scorer.fingerprint, **dataset.layout.fingerprint}
        saved = config.record_embeddings
        folder = RecordFolder.open(
            config.record,
            dataset.urls,
            fingerprint,
            config.resolved_threshold,
            embeddings=None if saved is None else scorer.describe_embeddings(DTYPES[saved]),
        )
        return BatchSource(dataset, config, scorer, lookup=RecordLookup(record=folder), recorder=Recorder(folder))

    @property
    def _topology(self) -> Topology:
        """Which streams this rank reads, as far as the ranks are known by now."""
        return self._topology_in(self.world or World.current())

    def _topology_in(self, world: World) -> Topology:
        if not isinstance(self.dataset, ClipWebDataset):
            return Topology(rank=0, world_size=1, num_workers=1, num_streams=1)
        return self.dataset.topology(world, max(1, self.config.num_workers), self.config.num_streams)

    def _start_of(self, epoch: int, stats: FilterStats | None = None) -> LoaderState:
        return LoaderState(progress=Progress.start(self._topology, epoch, stats), epoch=epoch)

    def _for_these_ranks(self, state: LoaderState) -> LoaderState:
        """The state; at the beginning of an epoch, with the streams that suit the ranks and workers of now."""
        return self._start_of(state.epoch, state.progress.stats) if state.is_beginning else state

    @property
    def stats(self) -> FilterStats:
        """Counts of all samples that this rank has scored since training began, those before a resume included."""
        return self._epoch.progress.stats if self._epoch else self._next.progress.stats

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at the start of this epoch; with ``end="repeat"``, where the stream is.

        A position within this epoch, from :meth:`load_state_dict`, is kept.

        Raises:
            TypeError: When it is no whole number.
            ValueError: When it is negative.
        """
        check_whole_number("epoch", epoch, 0)
        epoch = int(epoch)
        if self.config.end == "repeat":
            self._begin_at(replace(self._next, batches=0))
        elif epoch == self._next.epoch:
            self._begin_at(self._next)  # so that the state is this beginning, too, after an epoch that was broken off
        else:
            self._begin_at(self._start_of(epoch, self.stats))

    def _begin_at(self, state: LoaderState) -> None:
        self._next = self._last = state
        self._epoch = None
        self._remembered.append(state)

    def __len__(self) -> int:
        """Batches per epoch, which is known for ``end="repeat"`` only."""
        if self.config.batches_per_epoch is None:
            raise TypeError("how many batches pass the filter is not known beforehand")
        return self.config.batches_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches of one epoch; after a ``break``, of the next one. To evaluate they are the same every time.

        Raises:
            StarvationError: When nothing is kept.
            RuntimeError: When another rank failed, or has nothing to evaluate.
        """
        asked = getattr(self.dataset, "epoch", 0)
        if asked != self._asked_epoch:
            self._asked_epoch = asked
            self.set_epoch(asked)
        return self._iterate(self._next)

    def _iterate(self, begin: LoaderState) -> Iterator[dict[str, Any]]:
        world = self.world or World.current()
        if self._agreement is None:
            self._agreement = Agreement(world)
        self._begin_at(self._for_these_ranks(begin))
        epoch = self._epoch = Epoch(self._source, self.config, world, self._next)
        give = evaluation_batches if self.config.is_evaluation else training_batches
        try:
            for batch in give(epoch, self._agreement, self.config):
                self._remembered.append(epoch.state)
                if self._epoch is epoch:  # no other beginning was set meanwhile
                    self._last = epoch.state
                    self._next = self._following(epoch)  # now, since a trainer may never come back to this iterator
                yield batch
            # Only reached when the epoch was not broken off.
            self.left_over = epoch.num_left_over
            if self._epoch is epoch:
                self._last = self._following(epoch)
        finally:
            epoch.close()
            if self._epoch is epoch:
                self._next = self._following(epoch)

    def _following(self, epoch: Epoch) -> LoaderState:
        """Where the iteration after this one begins."""
        if self.config.end == "repeat":
            return replace(self._last, batches=0)
        number = epoch.begun_at.epoch + (0 if self.config.is_evaluation else 1)  # which is the same every time
        # The ranks are those of this one. At the program's end, when nothing can be imported, nobody can look them up.
        progress = Progress.start(self._topology_in(epoch.world), number, epoch.progress.stats)
        return LoaderState(progress=progress, epoch=number)

    def close(self) -> None:
        """End persistent workers. The next iteration starts others."""
        self._source.close()

    # --- state ---

    def state_dict(self, *, after: int | None = None) -> dict[str, Any]:
        """Where this rank is, after the batch handed out last; holds positions only, never samples. JSON-ready.

        Args:
            after: Instead, after this many batches of the epoch, for a trainer that fetches ahead of the batch that it
                trains on, also where it has begun another iteration there meanwhile. At most fifteen batches back.

        Raises:
            ValueError: When the dataset is not a :class:`ClipWebDataset`, the loader is there to evaluate, or ``after``
                lies too far back; and when Lightning saves a loader that it was given as it is.
        """
        if _is_code_of_lightning(sys._getframe(1)):
            raise ValueError(
                "Lightning may have fetched a batch that it did not train on, and can't say so here: resumed, the run "
                "would lack it. Give the Trainer a ClipFilterDataModule, whose checkpoints resume exactly, or let it "
                "save none: Trainer(enable_checkpointing=False)"
            )
        settings = self._settings()
        state = self._last
        if after is not None:
            states = [state for state in self._remembered if state.batches == after]
            if not states:
                raise ValueError(f"the state after {after} batches is no longer known; {state.batches} are out")
            state = states[-1]
        return {"version": _STATE_VERSION, "settings": settings, **self._for_these_ranks(state).to_json()}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Resume, with the next iteration, where :meth:`state_dict` was called.

        Args:
            state: This rank's, where there are as many ranks as there were; or the states of all ranks, of the same
                moment and in any order, which any number of ranks and workers can resume from.

        Raises:
            ValueError: When the state is of another version, dataset or setting, with both values; and when it is not
                this rank's, or some rank's is missing.
            TypeError: When it is no state, and no list of states.
        """
        states = states_in(state)
        for one in states:
            self._check_state(one)
        shared = share_out([LoaderState.from_json(one) for one in states], self._topology)
        check_streams(shared, self.config.end)
        self._begin_at(self._for_these_ranks(shared))

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state from which this loader would not resume exactly."""
        if state["version"] != _STATE_VERSION:
            raise ValueError(f"the state has version {state['version']}, this version reads {_STATE_VERSION}")
        here, there = self._settings(), state["settings"]
        if self.scorer is not None:
            here.pop("precision", None)  # a model decides alike in any
        if state["topology"]["world_size"] != self._topology.world_size:
            here.pop("batch_size")  # another one may be needed for all ranks' batches to be as large together
        check_settings(here, there)

    def _settings(self) -> dict[str, Any]:
        """All that the order of the kept samples depends on, but for ranks and workers."""
        if not isinstance(self.dataset, ClipWebDataset):
            raise ValueError("only a loader of a ClipWebDataset can be resumed")
        if self.config.is_evaluation:
            raise ValueError(f"end is {self.config.end!r}; only training, with 'sync' or 'repeat', can be resumed")
        scores = self.table or self.scorer
        fingerprint = scores.fingerprint if scores is not None else {}
        return settings_of(self.dataset, self.config, self._source.score_batch_size, fingerprint)


def _is_code_of_lightning(frame: FrameType) -> bool:
    """Whether a frame is that of the code that saves the loaders given to a Trainer."""
    return str(frame.f_globals.get("__name__")).endswith(".pytorch.utilities.combined_loader")
