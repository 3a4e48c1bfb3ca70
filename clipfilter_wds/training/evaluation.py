"""Gives evaluation its batches: every sample once on any number of ranks, of which none waits for ever."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.epoch import Epoch, other_rank_failed
from clipfilter_wds.training.rebatch import take
from clipfilter_wds.world import Agreement

Batch = dict[str, Any]

_FAILED, _SOME_HAVE_ONE, _ALL_ARE_THROUGH = range(3)


def evaluation_batches(epoch: Epoch, agreement: Agreement, config: LoaderConfig) -> Iterator[Batch]:
    """The batches of this rank.

    The ranks agree once, before the first batch, that each has one. Then with ``end="each"`` they never wait for each
    other again, so that one may stop early, or have fewer, as it likes. With ``end="pad"`` they agree before every
    batch whether any rank has one: how many pass the filter is known to no rank before its end, and a rank that waited
    there for the others' ends would be missing in the steps that they make until then.

    Raises:
        StarvationError: When no rank has a batch.
        RuntimeError: When another rank has none, or failed.
    """
    first = _first_batch(epoch, agreement)
    if config.end == "pad":
        yield from _padded(epoch, agreement, first, config.batch_size)
        return
    batch: Batch | None = first
    while batch is not None:
        yield batch
        batch = epoch.next_batch()


def _first_batch(epoch: Epoch, agreement: Agreement) -> Batch:
    try:
        batch = epoch.next_batch()
    except Exception:
        agreement.gather(None)  # the other ranks must not wait for this one
        raise
    told = agreement.gather((batch is not None, epoch.num_seen))
    if None in told:
        raise other_rank_failed()
    seen_by_empty = {rank: seen for rank, (has_batch, seen) in enumerate(told) if not has_batch}
    if len(seen_by_empty) == len(told):
        raise epoch.starved(f"all {sum(seen_by_empty.values()):,} samples left none")
    if seen_by_empty:
        seen = ", ".join(f"rank {rank} keeps none of its {seen:,} samples" for rank, seen in seen_by_empty.items())
        raise RuntimeError(
            f"{len(seen_by_empty)} of {len(told)} ranks have nothing to evaluate, so they would be missing where all "
            f"ranks meet: {seen}. Evaluate on fewer ranks (such as Trainer(devices=1)), without a filter, or on more "
            "shards"
        )
    assert batch is not None
    return batch


def _padded(epoch: Epoch, agreement: Agreement, first: Batch, batch_size: int) -> Iterator[Batch]:
    given = _filled(first, batch_size)
    while True:
        yield given
        try:
            batch = epoch.next_batch()
        except Exception:
            agreement.lowest(_FAILED)
            raise
        status = agreement.lowest(_ALL_ARE_THROUGH if batch is None else _SOME_HAVE_ONE)
        if status == _FAILED:
            raise other_rank_failed()
        if status == _ALL_ARE_THROUGH:
            return
        if batch is None:
            given = {**given, "is_padding": torch.ones(batch_size, dtype=torch.bool)}
        else:
            given = _filled(batch, batch_size)


def _filled(batch: Batch, batch_size: int) -> Batch:
    """A batch with its rows repeated until it has ``batch_size``, and the column that marks these."""
    # One of them a batch always has, by the loader's kind.
    num_rows, rows = len(batch["__key__"] if "__key__" in batch else batch["pixel_values"]), np.arange(batch_size)
    if num_rows < batch_size:
        batch = take(batch, rows % num_rows)
    return {**batch, "is_padding": torch.from_numpy(rows >= num_rows)}
