"""Scores batches, of a dataset or of any other loader."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from clipfilter_wds.scores.finite import finite_scores
from clipfilter_wds.training.batches import StreamBatch
from clipfilter_wds.training.rebatch import take
from clipfilter_wds.training.record import Recorder
from clipfilter_wds.training.stream import Position
from clipfilter_wds.types import DropReason

if TYPE_CHECKING:
    from clipfilter_wds.models.recheck import BatchScores, Recheck

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A scoring batch with its scores.

    Attributes:
        columns: What training may get.
        scores: Raw cosines of the N usable samples, float32 ``[N]``; 0.0 where no model scores them.
        has_columns: Which of these have a row in the columns, bool ``[N]``; the others are known to be dropped.
        unusable: The other samples, counted by reason.
        worker: The worker that they come from.
        after: Its position after this batch.
        failures: Shards that could not be used, with the reason.
    """

    columns: dict[str, Any]
    scores: np.ndarray
    has_columns: np.ndarray
    unusable: Mapping[DropReason, int]
    worker: int = 0
    after: Position = field(default_factory=Position)
    failures: tuple[tuple[str, str], ...] = ()


def score_stream(
    recheck: "Recheck | None", recorder: Recorder | None, batches: Iterable[StreamBatch]
) -> Iterator[Scored]:
    """Score, and record, those of a dataset's samples that have no score yet.

    The columns are the training views of the samples that may be kept, their keys and URLs.
    """
    for batch, cosines in _score(recheck, batches, lambda batch: batch.prepared.inputs):
        if recorder is not None and recheck is not None:
            recorder.add(batch, cosines, recheck.band)
        reasons = [row.reason for row in batch.rows]
        could_be_scored = np.array([reason is None for reason in reasons], dtype=bool)
        all_cosines = batch.known_scores.copy()
        all_cosines[could_be_scored & ~batch.is_known] = cosines
        scores, reasons = finite_scores(reasons, all_cosines[could_be_scored])
        usable = np.array([reason is None for reason in reasons], dtype=bool)
        yield Scored(
            columns=_columns(batch, usable),
            scores=scores[usable],
            has_columns=batch.has_views[usable],
            unusable=Counter(reason for reason in reasons if reason is not None),
            worker=batch.worker,
            after=batch.after,
            failures=tuple(batch.failures),
        )


def _columns(batch: StreamBatch, usable: np.ndarray) -> dict[str, Any]:
    views, places = batch.views, np.flatnonzero(batch.has_views)
    if not usable[places].all():
        views = take(views, np.flatnonzero(usable[places]).tolist())
    rows = places[usable[places]].tolist()
    return {**views, "__key__": [batch.rows[row].key for row in rows], "__url__": [batch.urls[row] for row in rows]}


def score_columns(recheck: "Recheck | None", batches: Iterable[Mapping[str, Any]]) -> Iterator[Scored]:
    """Score batches of any other loader; their columns are passed on as they are.

    Raises:
        ValueError: When ``pixel_values`` or ``input_ids`` is missing.
    """

    def inputs(batch: _UsableColumns) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids = batch.columns["input_ids"]
        if recheck is not None and len(input_ids):
            # They may be padded further than the longest caption, to a constant length.
            lengths = recheck.scorer.preprocess.tokenize.used_lengths(input_ids.flatten(0, -2))
            input_ids = input_ids[..., : int(lengths.max())]
        return batch.columns["pixel_values"], input_ids

    for batch, cosines in _score(recheck, map(_usable_columns, batches), inputs):
        scores, reasons = finite_scores([None] * len(cosines), cosines)
        finite, columns = [number for number, reason in enumerate(reasons) if reason is None], batch.columns
        if len(finite) < len(cosines):
            columns, scores = take(columns, finite), scores[finite]
        yield Scored(
            columns=columns,
            scores=scores,
            has_columns=np.ones(len(scores), dtype=bool),
            unusable=batch.unusable + Counter(reason for reason in reasons if reason is not None),
        )


class _UsableColumns(NamedTuple):
    columns: dict[str, Any]
    unusable: Counter[DropReason]


def _usable_columns(batch: Mapping[str, Any]) -> _UsableColumns:
    missing = {"pixel_values", "input_ids"} - set(batch)
    if missing:
        raise ValueError(f"a batch has the columns {sorted(batch)}, but no {' and no '.join(sorted(missing))}")
    columns, unusable = dict(batch), Counter[DropReason]()
    if any(reasons := columns.pop("reason", ())):
        usable = [number for number, reason in enumerate(reasons) if not reason]
        unusable = Counter(DropReason(reason) for reason in reasons if reason)
        columns = take(columns, usable)
    return _UsableColumns(columns, unusable)


def _score(
    recheck: "Recheck | None", batches: Iterable[T], inputs: Callable[[T], tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[tuple[T, np.ndarray]]:
    if recheck is None:
        for batch in batches:
            yield batch, np.zeros(len(inputs(batch)[0]), dtype=np.float32)
        return
    is_on_gpu = recheck.scorer.device.type == "cuda"
    scored = _map_beside_training(recheck, batches, inputs) if is_on_gpu else recheck.map(batches, inputs)
    for batch, scores in scored:
        yield batch, scores.scores


def _map_beside_training(
    recheck: "Recheck", batches: Iterable[T], inputs: Callable[[T], tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[tuple[T, "BatchScores"]]:
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

    return _taken_on(side, recheck.map(_taken_on(around, batches), inputs_for_side))


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
