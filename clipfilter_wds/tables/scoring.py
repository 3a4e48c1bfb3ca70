"""Image paths and captions of a table -> similarities: opened in DataLoader workers, scored in batches, in order."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.preprocess.clip import ClipPreprocess, OpenPair
from clipfilter_wds.scores.selection import passes
from clipfilter_wds.tables.images import check_protocol, is_remote, read_image
from clipfilter_wds.types import DropReason, UnusableError
from clipfilter_wds.workers.config import DEFAULT_WORKER_TIMEOUT
from clipfilter_wds.workers.crashes import (
    CrashTracker,
    Quarantine,
    WorkerDiedError,
    WorkerTracker,
)
from clipfilter_wds.workers.pool import iterating, worker_loader

#: Images of one batch that are fetched at a time, in each worker.
_NUM_FETCHERS = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pair:
    """What a row of a table says of image and caption; None where it says nothing."""

    image: str | None
    caption: str | None

    @classmethod
    def of_cells(cls, image: object, caption: object) -> "Pair":
        """Read two cells. Numbers are taken as they print; what is no text, number or path (NaN, None) is missing.

        Raises:
            ValueError: When the image's storage needs a package that is not installed.
        """
        path = _text(os.fsdecode(image) if isinstance(image, os.PathLike) else image)
        if path is not None:
            check_protocol(path)
        text = _text(caption)
        # JSON can hold half a surrogate pair, which no tokenizer takes.
        return cls(path, None if text is None else text.encode("utf-8", errors="replace").decode())


def _text(cell: object) -> str | None:
    if isinstance(cell, Real) and not math.isnan(cell):
        return str(cell)
    return cell if isinstance(cell, str) and cell.strip() else None


@dataclass(frozen=True, kw_only=True, eq=False)
class PairScores:
    """The scores of a run of pairs.

    Attributes:
        similarity: float32 ``[N]``: the cosine clipped to [0, 1], 0.0 where there is a reason.
        reasons: Per pair, why it could not be scored, or None.
        num_truncated: How many captions were longer than the text tower takes.
    """

    similarity: np.ndarray
    reasons: Sequence[DropReason | None]
    num_truncated: int

    def keep(self, threshold: float) -> np.ndarray:
        """Which pairs are kept, bool ``[N]``. What could not be scored is compared as 0.0, as the reference does."""
        return passes(self.similarity, threshold)


def score_pairs(
    batches: Iterable[tuple[T, Sequence[Pair]]],
    recheck: Recheck,
    *,
    folder: Path,
    num_workers: int,
    worker_timeout: float = DEFAULT_WORKER_TIMEOUT,
    table: str = "table",
) -> Iterator[tuple[T, PairScores]]:
    """Score batches of pairs in order. A few batches ahead of the one scored are drawn from ``batches`` and opened.

    A pair that twice kills the worker that opens it has the reason ``decoder_crash``.

    Args:
        batches: Pairs, each batch with whatever it shall come back with.
        recheck: The model; a batch is one forward pass.
        folder: Where relative image paths begin.
        num_workers: Processes that open images (0: this one, which an image can kill).
        worker_timeout: Seconds that one image may take to be read and decoded; 0 is for ever.
        table: What the pairs are of, for messages.

    Raises:
        WorkerDiedError: When workers die at once, or one after another with no batch in between.
    """
    opener = _PairOpener(recheck.scorer.preprocess, folder, table)
    pin_memory = recheck.scorer.device.type == "cuda"
    opened_batches = _open_batches(batches, opener, num_workers, worker_timeout, pin_memory)
    for (companion, opened), scored in recheck.map(
        opened_batches, lambda each: (each[1].pixel_values, each[1].input_ids)
    ):
        yield companion, _pair_scores(opened, scored.scores)


def score_pair_fp32(pair: Pair, scorer: ClipScorer, *, folder: Path) -> PairScores:
    """Score one pair in float32, in this process."""
    opened = _PairOpener(scorer.preprocess, folder)[_Request(0, [pair])]
    return _pair_scores(opened, scorer(opened.pixel_values, opened.input_ids, exact=True).cpu().numpy())


def _pair_scores(opened: "_OpenedBatch", cosines: np.ndarray) -> PairScores:
    similarity = np.zeros(len(opened.reasons), dtype=np.float32)
    similarity[[reason is None for reason in opened.reasons]] = cosines
    finite = np.isfinite(similarity)
    reasons = [reason if ok else DropReason.NOT_FINITE for reason, ok in zip(opened.reasons, finite, strict=True)]
    similarity = np.where(finite, np.clip(similarity, 0.0, 1.0), np.float32(0.0))
    return PairScores(similarity=similarity, reasons=reasons, num_truncated=opened.num_truncated)


# --- opening ---


class _Request(NamedTuple):
    """Pairs to open, and the row of the first of them."""

    start: int
    pairs: Sequence[Pair]


def _open_batches(
    batches: Iterable[tuple[T, Sequence[Pair]]],
    opener: "_PairOpener",
    num_workers: int,
    worker_timeout: float,
    pin_memory: bool,
) -> Iterator[tuple[T, "_OpenedBatch"]]:
    """Have batches opened, in order; those that were under way when a worker died are asked for once more."""
    quarantine = Quarantine()
    under_way: deque[tuple[T, _Request]] = deque()
    numbered = _numbered(batches)

    def requests() -> Iterator[_Request]:
        yield from [request for _, request in under_way]
        for item in numbered:
            under_way.append(item)
            yield item[1]

    while True:
        opener.tracker = CrashTracker([opener.table], num_workers, timeout=worker_timeout, left_out=quarantine.left_out)
        loader = worker_loader(
            opener,
            num_workers=num_workers,
            pin_memory=pin_memory,
            requests=requests(),
            tracker=opener.tracker,
        )
        try:
            with iterating(loader) as opened_batches:
                for opened in opened_batches:
                    quarantine.outlived()
                    yield under_way.popleft()[0], opened
            return
        except WorkerDiedError as death:
            quarantine.add(death)


def _numbered(batches: Iterable[tuple[T, Sequence[Pair]]]) -> Iterator[tuple[T, _Request]]:
    start = 0
    for companion, pairs in batches:
        yield companion, _Request(start, pairs)
        start += len(pairs)


# --- in the workers ---


@dataclass(frozen=True, kw_only=True)
class _OpenedBatch:
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    reasons: list[DropReason | None]
    num_truncated: int

    def pin_memory(self) -> "_OpenedBatch":
        return _OpenedBatch(
            pixel_values=self.pixel_values.pin_memory(),
            input_ids=self.input_ids.pin_memory(),
            reasons=self.reasons,
            num_truncated=self.num_truncated,
        )


class _PairOpener(Dataset[_OpenedBatch]):
    """A batch of pairs -> what the scorer takes, and the reasons of those that it can't take."""

    def __init__(self, preprocess: ClipPreprocess, folder: Path, table: str = "table") -> None:
        self._preprocess, self._folder, self.table = preprocess, folder, table
        #: Where workers leave what they are at.
        self.tracker = CrashTracker([table], 0)

    def __getitem__(self, request: _Request) -> _OpenedBatch:
        worker_tracker = self.tracker.for_worker()
        # Files are read one after another, so that one is in memory at a time; what comes over a network, side by side.
        with ThreadPoolExecutor(_NUM_FETCHERS, thread_name_prefix="clipfilter-fetch") as fetchers:
            readers = [self._reader(pair, fetchers) for pair in request.pairs]
            outcomes = [
                self._open(row, pair, read, worker_tracker)
                for row, (pair, read) in enumerate(zip(request.pairs, readers, strict=True), request.start)
            ]
        opened = [outcome for outcome in outcomes if isinstance(outcome, OpenPair)]
        pixel_values, tokens = self._preprocess.collate(opened)
        return _OpenedBatch(
            pixel_values=pixel_values,
            input_ids=tokens.input_ids,
            reasons=[None if isinstance(outcome, OpenPair) else outcome for outcome in outcomes],
            num_truncated=sum(tokens.truncated),
        )

    def _reader(self, pair: Pair, fetchers: ThreadPoolExecutor) -> Callable[[], bytes]:
        read = partial(read_image, pair.image or "", self._folder)
        is_fetched = pair.caption is not None and pair.image is not None and is_remote(pair.image)
        return fetchers.submit(read).result if is_fetched else read

    def _open(
        self, row: int, pair: Pair, read: Callable[[], bytes], worker_tracker: WorkerTracker
    ) -> OpenPair | DropReason:
        if pair.caption is None:
            return DropReason.BLANK_CAPTION
        if pair.image is None:
            return DropReason.MISSING_IMAGE
        if worker_tracker.is_left_out(self.table, row):
            return DropReason.DECODER_CRASH
        try:
            with worker_tracker.at(self.table, row):
                return self._preprocess.open_pair(read(), pair.caption)
        except UnusableError as unusable:
            return unusable.reason


def batched(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    """Runs of ``size`` pairs; the last one may be shorter."""
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
