"""Scores batches of any loader, whose columns are those of ``scorer.preprocess``."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from clipfilter_wds.preprocess.rows import count_reasons
from clipfilter_wds.scores.finite import finite_scores
from clipfilter_wds.training.collate import ColumnReader
from clipfilter_wds.training.rebatch import take
from clipfilter_wds.training.scoring import Scored, score_batches
from clipfilter_wds.types import NO_REASON, DropReason

if TYPE_CHECKING:
    from clipfilter_wds.models.recheck import Recheck

#: What a filter needs of a batch.
INPUTS = ("pixel_values", "input_ids", "reason")


def score_columns(recheck: "Recheck | None", batches: Iterable[Mapping[str, Any]]) -> Iterator[Scored]:
    """Score batches of any loader; all their columns but ``reason`` are passed on as they are.

    Raises:
        TypeError: When a batch is no dict, or its pixels are no uint8.
        ValueError: When ``pixel_values``, ``input_ids`` or ``reason`` is missing, columns have unequal numbers of rows,
            or an item is no batch.
    """

    def inputs(batch: _Usable) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids = batch.columns["input_ids"]
        if recheck is not None and len(input_ids):
            # They may be padded further than the longest caption, to a constant length.
            lengths = recheck.scorer.preprocess.tokenize.used_lengths(input_ids.flatten(0, -2))
            input_ids = input_ids[..., : int(lengths.max())]
        return batch.columns["pixel_values"], input_ids

    reader = ColumnReader()
    usable = (_usable(batch, reader) for batch in batches)
    for batch, cosines, _ in score_batches(recheck, usable, inputs, lambda batch, may_be_kept: batch):
        scores, reasons = finite_scores(np.full(len(cosines), NO_REASON, dtype=np.int8), cosines)
        places = np.flatnonzero(reasons == NO_REASON)
        not_finite = count_reasons(reasons)
        yield Scored(
            columns=batch.columns, scores=scores[places], places=places, unusable={**batch.unusable, **not_finite}
        )


class _Usable(NamedTuple):
    """The rows of a batch that can be scored, and why the others can't, counted."""

    columns: dict[str, Any]
    unusable: dict[DropReason, int]


def _usable(batch: Mapping[str, Any], reader: ColumnReader) -> _Usable:
    _check(batch)
    columns = dict(batch)
    reasons = list(map(str, columns.pop("reason")))
    columns["pixel_values"] = _as_uint8(torch.as_tensor(columns["pixel_values"]))
    columns["input_ids"] = torch.as_tensor(columns["input_ids"])
    columns = reader.read(columns, len(reasons))
    if any(reasons):
        columns = take(columns, np.array([row for row, reason in enumerate(reasons) if not reason], dtype=np.int64))
    return _Usable(columns, dict(Counter(DropReason(reason) for reason in reasons if reason)))


def _check(batch: Mapping[str, Any]) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a {type(batch).__name__}; it has to be a dict of columns, or, for clip_filter, a tuple whose "
            "`columns` are named"
        )
    if missing := set(INPUTS) - set(batch):
        raise ValueError(
            f"a batch has the columns {sorted(map(str, batch))}, but no {' and no '.join(sorted(missing))}; "
            "scorer.preprocess gives all three. The reason is empty, or says why a sample can't be scored, which else "
            "would be as a black image"
        )
    if is_sample(batch):
        raise ValueError(
            "this is a loader of samples, not of batches: pixel_values is one image, of the shape "
            f"{tuple(batch['pixel_values'].shape)}. Make batches first, with `.batched(64)` of webdataset or "
            "`DataLoader(..., batch_size=64)`"
        )
    lengths = {name: len(batch[name]) for name in INPUTS}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"a batch has columns of different lengths: {lengths}")


def is_sample(item: Mapping[str, Any]) -> bool:
    """Whether these are the columns of one sample, not of a batch."""
    return isinstance(item.get("reason"), str)


def _as_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Hugging Face's torch format has whole numbers in int64."""
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.is_floating_point():
        raise TypeError(f"pixel_values are {pixels.dtype}; pass on the uint8 that scorer.preprocess gives")
    return pixels.to(torch.uint8)
