"""Batches of a dataset, or of anybody's loader -> scored batches."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import compress
from typing import Any

import numpy as np
import torch

from clipfilter_wds.dataset import StreamBatch
from clipfilter_wds.rebatch import take
from clipfilter_wds.scorer import ClipScorer
from clipfilter_wds.stream import Position
from clipfilter_wds.types import DropReason


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A scoring batch with its scores: columns hold the usable samples only."""

    columns: dict[str, Any]
    scores: np.ndarray
    unusable: Mapping[DropReason, int]
    worker: int = 0
    after: Position = field(default_factory=Position)
    failures: tuple[tuple[str, str], ...] = ()


def score_stream_batch(scorer: ClipScorer | None, batch: StreamBatch) -> Scored:
    """Score a dataset's batch; its columns are the training views of the usable samples, their keys and URLs."""
    usable = [row.reason is None for row in batch.rows]
    columns = {
        **batch.views,
        "__key__": [row.key for row in batch.rows if row.reason is None],
        "__url__": list(compress(batch.urls, usable)),
    }
    columns, scores, not_finite = _scored_rows(scorer, columns, batch.pixel_values, batch.input_ids)
    return Scored(
        columns=columns,
        scores=scores,
        unusable=Counter(row.reason for row in batch.rows if row.reason is not None) + not_finite,
        worker=batch.worker,
        after=batch.after,
        failures=tuple(batch.failures),
    )


def score_columns(scorer: ClipScorer | None, batch: Mapping[str, Any]) -> Scored:
    """Score a batch of anybody's loader; its columns are passed on as they are.

    Raises:
        ValueError: When ``pixel_values`` or ``input_ids`` is missing.
    """
    missing = {"pixel_values", "input_ids"} - set(batch)
    if missing:
        raise ValueError(f"a batch has the columns {sorted(batch)}, but no {' and no '.join(sorted(missing))}")
    columns, unusable = dict(batch), Counter[DropReason]()
    if any(reasons := columns.pop("reason", ())):
        usable = [number for number, reason in enumerate(reasons) if not reason]
        unusable = Counter(DropReason(reason) for reason in reasons if reason)
        columns = take(columns, usable)
    input_ids = columns["input_ids"]
    if scorer is not None:
        input_ids = _without_padding(input_ids, scorer.preprocess.tokenize.pad_id)
    columns, scores, not_finite = _scored_rows(scorer, columns, columns["pixel_values"], input_ids)
    return Scored(columns=columns, scores=scores, unusable=unusable + not_finite)


def _without_padding(input_ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Cut what is padding in every row but for one token, since padding may be the end of text."""
    used = (input_ids != pad_id).any(dim=0).nonzero()
    return input_ids[:, : int(used[-1]) + 2] if len(used) else input_ids


def _scored_rows(
    scorer: ClipScorer | None, columns: dict[str, Any], pixel_values: torch.Tensor, input_ids: torch.Tensor
) -> tuple[dict[str, Any], np.ndarray, Counter[DropReason]]:
    """The rows that have a score, the scores, and how many rows have none because the model gave no number."""
    scores = _scores(scorer, pixel_values, input_ids)
    finite = np.isfinite(scores)
    if scorer is None or finite.all():
        return columns, scores, Counter()
    not_finite = Counter({DropReason.NOT_FINITE: int((~finite).sum())})
    return take(columns, np.flatnonzero(finite).tolist()), scores[finite], not_finite


def _scores(scorer: ClipScorer | None, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> np.ndarray:
    """Score on a stream of this thread's own, so that waiting for the scores does not wait for the training step."""
    if scorer is None:
        return np.full(len(pixel_values), np.nan, dtype=np.float32)
    if scorer.device.type != "cuda":
        scores: np.ndarray = scorer(pixel_values, input_ids).numpy()
        return scores
    with torch.cuda.stream(_side_stream(scorer.device)):
        on_device: np.ndarray = scorer(pixel_values, input_ids).cpu().numpy()
        return on_device


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
