"""Scores batches, of a dataset or of any other loader."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from clipfilter_wds.preprocess.rows import count_reasons
from clipfilter_wds.scores.finite import finite_scores
from clipfilter_wds.training.batches import StreamBatch
from clipfilter_wds.training.rebatch import NewTensor, take
from clipfilter_wds.training.record import Recorder
from clipfilter_wds.training.recycler import Recycler
from clipfilter_wds.training.stream import StreamProgress
from clipfilter_wds.types import NO_REASON, DropReason
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
    """

    columns: dict[str, Any]
    scores: np.ndarray
    places: np.ndarray
    unusable: Mapping[DropReason, int]
    worker: int = 0
    stream: int = 0
    after: StreamProgress = field(default_factory=StreamProgress)
    failures: tuple[tuple[str, str], ...] = ()


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
    scored = _score(recheck, map(lent, batches), lambda batch: batch.item.prepared.inputs, hold)
    for (batch, columns, places), cosines in scored:
        if recorder is not None and recheck is not None:
            recorder.add(batch, cosines, recheck.band)
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


# --- batches of any other loader ---


class _Columns(NamedTuple):
    columns: dict[str, Any]
    unusable: dict[DropReason, int]


def score_columns(recheck: "Recheck | None", batches: Iterable[Mapping[str, Any]]) -> Iterator[Scored]:
    """Score batches of any other loader; their columns are passed on as they are.

    Raises:
        ValueError: When ``pixel_values``, ``input_ids`` or ``reason`` is missing.
    """

    def inputs(batch: _Columns) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids = batch.columns["input_ids"]
        if recheck is not None and len(input_ids):
            # They may be padded further than the longest caption, to a constant length.
            lengths = recheck.scorer.preprocess.tokenize.used_lengths(input_ids.flatten(0, -2))
            input_ids = input_ids[..., : int(lengths.max())]
        return batch.columns["pixel_values"], input_ids

    usable = map(_usable_columns, batches)
    for batch, cosines in _score(recheck, usable, inputs, lambda batch, may_be_kept: batch):
        scores, reasons = finite_scores(np.full(len(cosines), NO_REASON, dtype=np.int8), cosines)
        places = np.flatnonzero(reasons == NO_REASON)
        not_finite = count_reasons(reasons)
        yield Scored(
            columns=batch.columns, scores=scores[places], places=places, unusable={**batch.unusable, **not_finite}
        )


def _usable_columns(batch: Mapping[str, Any]) -> _Columns:
    missing = {"pixel_values", "input_ids", "reason"} - set(batch)
    if missing:
        raise ValueError(
            f"a batch has the columns {sorted(batch)}, but no {' and no '.join(sorted(missing))}; scorer.preprocess "
            "gives all three. The reason is empty, or says why a sample can't be scored, which else would be as a "
            "black image"
        )
    columns, unusable = dict(batch), Counter[DropReason]()
    if any(reasons := columns.pop("reason", ())):
        usable = [number for number, reason in enumerate(reasons) if not reason]
        unusable = Counter(DropReason(reason) for reason in reasons if reason)
        columns = take(columns, np.array(usable, dtype=np.int64))
    return _Columns(columns, dict(unusable))


# --- the model ---


def _score(
    recheck: "Recheck | None",
    batches: Iterable[T],
    inputs: Callable[[T], tuple[torch.Tensor, torch.Tensor]],
    hold: Callable[[T, np.ndarray], U],
) -> Iterator[tuple[U, np.ndarray]]:
    if recheck is None:
        for batch in batches:
            num_samples = len(inputs(batch)[0])
            yield hold(batch, np.ones(num_samples, dtype=bool)), np.zeros(num_samples, dtype=np.float32)
        return
    is_on_gpu = recheck.scorer.device.type == "cuda"
    map_ = partial(_map_beside_training, recheck) if is_on_gpu else recheck.map
    scored = map_(batches, inputs, hold)
    for held, scores in scored:
        yield held, scores.scores


def _map_beside_training(
    recheck: "Recheck",
    batches: Iterable[T],
    inputs: Callable[[T], tuple[torch.Tensor, torch.Tensor]],
    hold: Callable[[T, np.ndarray], U],
) -> Iterator[tuple[U, "BatchScores"]]:
    """Score on a CUDA stream of its own, so that waiting for the scores does not wait for the training step."""
    side, around = _side_stream(recheck.scorer.device), torch.cuda.current_stream(recheck.scorer.device)

    def inputs_for_side(batch: T) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.cuda.stream(around):
            tensors = inputs(batch)
        for tensor in tensors:
            if tensor.is_cuda:  # another loader's batch may be there
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
