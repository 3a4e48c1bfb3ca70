"""Scores the image-caption pairs of a table, in order: opened in worker processes, scored in batches."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Dataset

from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.preprocess.batch import BatchBuilder, PreparedBatch
from clipfilter_wds.preprocess.clip import ClipPreprocess, ImageOut, OpenPair
from clipfilter_wds.preprocess.rows import SampleRows, reasons_of
from clipfilter_wds.scores.finite import finite_scores
from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.tables.cells import caption_of, image_of
from clipfilter_wds.tables.images import StoredImage, is_remote, read_image
from clipfilter_wds.types import DropReason, UnusableError
from clipfilter_wds.workers.config import DEFAULT_WORKER_TIMEOUT
from clipfilter_wds.workers.crashes import CrashTracker, WorkerTracker
from clipfilter_wds.workers.pool import worker_loader
from clipfilter_wds.workers.restart import restarting
from clipfilter_wds.workers.transport import Lent, lent, slot_buffer

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
        """Read two cells.

        Raises:
            ValueError: When the image's storage needs a package that is not installed.
        """
        return cls(image_of(image), caption_of(caption))

    def __reduce__(self) -> tuple[Any, ...]:
        # A stored image alone pickles as its name; on the way to a worker its bytes are needed.
        if isinstance(self.image, StoredImage):
            return _with_bytes, (str(self.image), self.image.data, self.caption)
        return Pair, (self.image, self.caption)


def _with_bytes(name: str, data: bytes, caption: str | None) -> Pair:
    return Pair(StoredImage(name, data), caption)


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
        return COSINES.passes(self.similarity, threshold)


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
    opener = _PairOpener(recheck.scorer.preprocess, folder, table, interleaved=recheck.scorer.copies_inputs)
    opened = _open_batches(batches, opener, num_workers, worker_timeout, lend=recheck.scorer.copies_inputs)
    for (companion, rows), scored in recheck.map(opened, lambda each: each[1].item.inputs, _hold):
        yield companion, _pair_scores(rows, scored.scores)


def score_pair_fp32(pair: Pair, scorer: ClipScorer, *, folder: Path) -> PairScores:
    """Score one pair in float32, in this process."""
    prepared = _PairOpener(scorer.preprocess, folder)[_Request(0, [pair])]
    return _pair_scores(prepared.rows, scorer(*prepared.inputs, exact=True).cpu().numpy())


def _hold(opened: tuple[T, Lent[PreparedBatch]], may_be_kept: np.ndarray) -> tuple[T, SampleRows]:
    companion, prepared = opened
    rows = prepared.item.rows
    prepared.release()
    return companion, rows


def _pair_scores(rows: SampleRows, cosines: np.ndarray) -> PairScores:
    scores, codes = finite_scores(rows.reasons, cosines)
    reasons = reasons_of(codes)
    return PairScores(similarity=np.clip(scores, 0.0, 1.0), reasons=reasons, num_truncated=rows.num_truncated)


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
    *,
    lend: bool,
) -> Iterator[tuple[T, Lent[PreparedBatch]]]:
    """Have batches opened, in order; those that were under way when a worker died are asked for once more."""
    under_way: deque[tuple[T, _Request]] = deque()
    numbered = _numbered(batches)

    def requests() -> Iterator[_Request]:
        yield from [request for _, request in under_way]
        for item in numbered:
            under_way.append(item)
            yield item[1]

    def start(tracker: CrashTracker) -> Iterable[Any]:
        return worker_loader(
            replace(opener, tracker=tracker),
            num_workers=num_workers,
            lend=lend,
            requests=requests(),
            tracker=tracker,
        )

    started = restarting(start, [opener.table], num_workers=num_workers, worker_timeout=worker_timeout)
    with closing(started) as opened:
        for prepared in map(lent, opened):
            yield under_way.popleft()[0], prepared


def _numbered(batches: Iterable[tuple[T, Sequence[Pair]]]) -> Iterator[tuple[T, _Request]]:
    start = 0
    for companion, pairs in batches:
        yield companion, _Request(start, pairs)
        start += len(pairs)


# --- in the workers ---


@dataclass(frozen=True, eq=False)
class _PairOpener(Dataset[PreparedBatch]):
    """Opens a batch of pairs when it is asked for."""

    preprocess: ClipPreprocess
    folder: Path
    table: str = "table"
    interleaved: bool = False
    tracker: CrashTracker | None = None

    def __getitem__(self, request: _Request) -> PreparedBatch:
        worker_tracker = (self.tracker or CrashTracker([self.table], 0)).for_worker()
        builder = BatchBuilder(self.preprocess, len(request.pairs), slot_buffer, interleaved=self.interleaved)
        # Files are read one after another, so that one is in memory at a time; what comes over a network, side by side.
        with ThreadPoolExecutor(_NUM_FETCHERS, thread_name_prefix="clipfilter-fetch") as fetchers:
            readers = [self._reader(pair, fetchers) for pair in request.pairs]
            for row, (pair, read) in enumerate(zip(request.pairs, readers, strict=True), request.start):
                builder.add(pair.image or "", row, partial(self._open, row, pair, read, worker_tracker))
        return builder.build()

    def _reader(self, pair: Pair, fetchers: ThreadPoolExecutor) -> Callable[[], bytes]:
        read = partial(read_image, pair.image or "", self.folder)
        is_fetched = pair.caption is not None and pair.image is not None and is_remote(pair.image)
        return fetchers.submit(read).result if is_fetched else read

    def _open(
        self, row: int, pair: Pair, read: Callable[[], bytes], worker_tracker: WorkerTracker, out: ImageOut
    ) -> OpenPair:
        if pair.caption is None:
            raise UnusableError(DropReason.BLANK_CAPTION)
        if pair.image is None:
            raise UnusableError(DropReason.MISSING_IMAGE)
        if worker_tracker.is_left_out(self.table, row):
            raise UnusableError(DropReason.DECODER_CRASH)
        with worker_tracker.at(self.table, row):
            return self.preprocess.open_pair(read(), pair.caption, out)


def batched(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    """Runs of ``size`` pairs; the last one may be shorter."""
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
