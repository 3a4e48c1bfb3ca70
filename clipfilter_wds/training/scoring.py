"""Scores batches of a dataset."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from clipfilter_wds.preprocess.packed import Images
from clipfilter_wds.preprocess.rows import count_reasons
from clipfilter_wds.scores.finite import finite_scores
from clipfilter_wds.scores.kind import COSINES, ScoreKind
from clipfilter_wds.training.batches import StreamBatch
from clipfilter_wds.training.rebatch import NewTensor, take
from clipfilter_wds.training.record import Recorder
from clipfilter_wds.training.recycler import Recycler
from clipfilter_wds.training.stream import PartEnd, StreamProgress
from clipfilter_wds.types import NO_REASON, DropReason, FilterStats
from clipfilter_wds.workers.transport import Lent, lent

if TYPE_CHECKING:
    from clipfilter_wds.models.recheck import BatchScores, Recheck

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A scoring batch with its scores.

    Attributes:
        columns: What training may get.
        scores: Raw cosines of the N usable samples, float32 ``[N]``; 0.0 where no model scores them.
        places: Their rows in the columns, int64 ``[N]``; -1 for those that have none, since they are dropped.
        unusable: The other samples, counted by reason.
        worker: The worker that they come from.
        stream: The stream that they come from.
        after: How far that is after this batch.
        failures: Shards that could not be used, with the reason.
        ends: Shards of which this stream has given all its samples.
    """

    columns: dict[str, Any]
    scores: np.ndarray
    places: np.ndarray
    unusable: Mapping[DropReason, int]
    worker: int = 0
    stream: int = 0
    after: StreamProgress = field(default_factory=StreamProgress)
    failures: tuple[tuple[str, str], ...] = ()
    ends: tuple[PartEnd, ...] = ()

    def decide(self, threshold: float | None, kind: ScoreKind = COSINES) -> tuple[np.ndarray, FilterStats]:
        """Which of the usable samples are kept, bool ``[N]``, and the counts of all; None as threshold keeps all."""
        keep = np.ones(len(self.scores), dtype=bool) if threshold is None else kind.passes(self.scores, threshold)
        kept = int(keep.sum())
        dropped = +Counter({**self.unusable, DropReason.BELOW_THRESHOLD: len(keep) - kept})
        return keep, FilterStats(seen=len(keep) + sum(self.unusable.values()), kept=kept, dropped=dict(dropped))


# --- batches of a dataset ---


class _Held(NamedTuple):
    """What is left of a batch when it is scored: its columns, and per sample the row there, -1 where it has none."""

    batch: StreamBatch
    columns: dict[str, Any]
    places: np.ndarray


def score_stream(
    recheck: "Recheck | None", recorder: Recorder | None, batches: Iterable[StreamBatch | Lent[StreamBatch]]
) -> Iterator[Scored]:
    """Score, and record, those of a dataset's samples that have no score yet.

    The columns are the training views of the samples that may be kept, their keys and URLs.
    """
    hold = partial(_hold, Recycler())
    scored = score_batches(recheck, map(lent, batches), lambda batch: batch.item.prepared.inputs, hold)
    for (batch, columns, places), cosines, embeddings in scored:
        if recorder is not None and recheck is not None:
            recorder.add(batch, cosines, recheck.band, embeddings)
        could_be_scored = batch.rows.usable
        all_cosines = batch.known_scores.copy()
        all_cosines[could_be_scored & ~batch.is_known] = cosines
        scores, reasons = finite_scores(batch.rows.reasons, all_cosines[could_be_scored])
        usable = reasons == NO_REASON
        yield Scored(
            columns=columns,
            scores=scores[usable],
            places=places[usable],
            unusable=count_reasons(reasons),
            worker=batch.worker,
            stream=batch.stream,
            after=batch.after,
            failures=tuple(batch.failures),
            ends=tuple(batch.ends),
        )


def _hold(new: NewTensor, borrowed: Lent[StreamBatch], may_be_kept: np.ndarray) -> _Held:
    """Take what training may get of a batch, and give its memory back."""
    batch = borrowed.item
    may_be_given = batch.has_views.copy()
    may_be_given[batch.rows.usable & ~batch.is_known] &= may_be_kept
    rows, views = np.flatnonzero(may_be_given), batch.views
    if borrowed.is_shared or len(rows) < batch.has_views.sum():
        views = take(views, np.flatnonzero(may_be_given[batch.has_views]), new)
    keys = [batch.rows.keys[row] for row in rows.tolist()]
    urls = [batch.urls[number] for number in batch.url_of[rows].tolist()]
    places = np.full(len(batch.rows), -1)
    places[rows] = np.arange(len(rows))
    held = _Held(batch.without_views(), {**views, "__key__": keys, "__url__": urls}, places)
    borrowed.release()
    return held


# --- the model ---


def score_batches(
    recheck: "Recheck | None",
    batches: Iterable[T],
    inputs: Callable[[T], tuple[Images, torch.Tensor]],
    hold: Callable[[T, np.ndarray], U],
) -> Iterator[tuple[U, np.ndarray, np.ndarray | None]]:
    """Score batches as ``Recheck.map`` does, beside training on a GPU; every score is 0.0 where there is no model.

    Each comes with its scores, and with its embeddings where these were asked for; see ``BatchScores``.
    """
    if recheck is None:
        for batch in batches:
            num_samples = len(inputs(batch)[0])
            yield hold(batch, np.ones(num_samples, dtype=bool)), np.zeros(num_samples, dtype=np.float32), None
        return
    is_on_gpu = recheck.scorer.device.type == "cuda"
    map_ = partial(_map_beside_training, recheck) if is_on_gpu else recheck.map
    scored = map_(batches, inputs, hold)
    for held, scores in scored:
        yield held, scores.scores, scores.embeddings


def _map_beside_training(
    recheck: "Recheck",
    batches: Iterable[T],
    inputs: Callable[[T], tuple[Images, torch.Tensor]],
    hold: Callable[[T, np.ndarray], U],
) -> Iterator[tuple[U, "BatchScores"]]:
    """Score on a CUDA stream of its own, so that waiting for the scores does not wait for the training step."""
    side, around = _side_stream(recheck.scorer.device), torch.cuda.current_stream(recheck.scorer.device)

    def inputs_for_side(batch: T) -> tuple[Images, torch.Tensor]:
        with torch.cuda.stream(around):
            tensors = inputs(batch)
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:  # another loader's batch may be there
                side.wait_stream(around)
                tensor.record_stream(side)
        return tensors

    return _taken_on(side, recheck.map(_taken_on(around, batches), inputs_for_side, hold))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)
    return stream


def _taken_on(stream: torch.cuda.Stream, items: Iterable[T]) -> Iterator[T]:
    """The items, each of them made while this stream is the current one."""
    iterator = iter(items)
    while True:
        with torch.cuda.stream(stream):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
