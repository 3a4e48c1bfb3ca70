"""Dataset -> scorer -> selection -> batches of constant size, while training runs; resumable, on any ranks."""

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cache
from hashlib import sha256
from itertools import compress
from typing import Any, Literal

import numpy as np
import torch

from clipfilter_wds.dataset import ClipWebDataset, StreamBatch, StreamWorker, worker_loader
from clipfilter_wds.feed import Feed
from clipfilter_wds.rebatch import Rebatcher, take
from clipfilter_wds.scorer import ClipScorer
from clipfilter_wds.selection import DEFAULT_THRESHOLD, check_threshold, passes
from clipfilter_wds.shards import public_url
from clipfilter_wds.stream import Position
from clipfilter_wds.types import DropReason, FilterStats
from clipfilter_wds.watch import KeepRateWatch
from clipfilter_wds.world import Agreement, World

_log = logging.getLogger(__name__)

End = Literal["sync", "repeat"]

_STATE_VERSION = 1
#: States kept of the batches handed out last; Lightning fetches one batch ahead of the one that it trains on.
_NUM_REMEMBERED = 4
_READY, _OUT_OF_BATCHES, _FAILED = 2, 1, 0


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a :class:`ClipFilterLoader` works.

    Attributes:
        threshold: Keep a pair when ``clip(score, 0, 1)`` is at least this; None keeps all and only adds scores.
        batch_size: Pairs per training batch.
        score_batch_size: Samples per forward pass of the scorer.
        num_workers: Processes that read and decode.
        drop_last: Leave out an epoch's last batch when it is smaller than the others.
        end: With several ranks, how an epoch ends. ``sync``: for all together, when the first has no further batch.
            ``repeat``: after ``batches_per_epoch`` batches; the stream of shards goes on for ever.
        batches_per_epoch: For ``repeat``.
        starvation_limit: Samples in a row without one that is kept after which to raise an error.
        multiprocessing_context: ``fork``, ``spawn`` or ``forkserver``; None is Python's default.

    Raises:
        ValueError: When one of them can't be used.
    """

    threshold: float | None = DEFAULT_THRESHOLD
    batch_size: int = 256
    score_batch_size: int = 64
    num_workers: int = 0
    drop_last: bool = False
    end: End = "sync"
    batches_per_epoch: int | None = None
    starvation_limit: int = 100_000
    multiprocessing_context: str | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold)
        for name, lowest in (("batch_size", 1), ("score_batch_size", 1), ("num_workers", 0), ("starvation_limit", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        if self.end not in ("sync", "repeat"):
            raise ValueError(f"end is {self.end!r}; use 'sync' or 'repeat'")
        if (self.end == "repeat") != (self.batches_per_epoch is not None):
            raise ValueError(
                f"end is {self.end!r} and batches_per_epoch {self.batches_per_epoch}; 'repeat' goes with it"
            )


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """A scoring batch with its scores: columns hold the usable samples only."""

    columns: dict[str, Any]
    scores: np.ndarray
    unusable: Mapping[DropReason, int]
    worker: int = 0
    after: Position = field(default_factory=Position)
    failures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """How far the stream is: per worker its position, whose batch comes next, and the counts so far."""

    positions: tuple[Position, ...]
    next_worker: int = 0
    stats: FilterStats = field(default_factory=FilterStats)

    @property
    def epoch(self) -> int:
        return min(position.epoch for position in self.positions)

    def advance(self, scored: _Scored, counts: FilterStats) -> "_Progress":
        """After a scoring batch."""
        positions = list(self.positions)
        positions[scored.worker] = scored.after
        return _Progress(
            positions=tuple(positions),
            next_worker=(scored.worker + 1) % len(positions),
            stats=self.stats + counts,
        )


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """A point between two training batches.

    Attributes:
        progress: Before the scoring batch that holds the first kept pair not handed out.
        epoch: The epoch that the iteration began in.
        handed: How many kept pairs of that scoring batch were handed out.
        batches: Training batches handed out in this epoch.
    """

    progress: _Progress
    epoch: int
    handed: int = 0
    batches: int = 0

    @classmethod
    def start(cls, num_positions: int, epoch: int, stats: FilterStats) -> "_Mark":
        """The beginning of an epoch."""
        progress = _Progress(positions=(Position(epoch=epoch),) * num_positions, stats=stats)
        return cls(progress=progress, epoch=epoch)

    def to_json(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "handed": self.handed,
            "next_worker": self.progress.next_worker,
            "positions": [list(astuple(position)) for position in self.progress.positions],
            "stats": asdict(self.progress.stats),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "_Mark":
        stats = state["stats"]
        dropped = {DropReason(reason): count for reason, count in stats["dropped"].items()}
        progress = _Progress(
            positions=tuple(Position(*position) for position in state["positions"]),
            next_worker=state["next_worker"],
            stats=FilterStats(seen=stats["seen"], kept=stats["kept"], dropped=dropped),
        )
        return cls(progress=progress, epoch=state["epoch"], handed=state["handed"], batches=state["batches"])


class ClipFilterLoader:
    """Training batches of the pairs whose caption describes the image.

    A batch is a dict: ``image`` and ``text`` (what the dataset's transforms made of them, collated), ``score`` (raw
    cosine, float32 ``[batch_size]``), ``__key__`` and ``__url__`` (lists of str); all on the CPU. Workers read and
    decode, a thread scores a few batches ahead, and training gets what is kept.

    Args:
        dataset: A :class:`~clipfilter_wds.dataset.ClipWebDataset`; or any iterable of dicts that hold ``pixel_values``
            and ``input_ids`` as ``scorer.preprocess`` makes them, whose other columns are passed on (such a
            loader can't be resumed).
        scorer: The model; None keeps everything and adds no scores, for loaders that are sometimes filtered.
        world: This rank among all; None takes it from ``torch.distributed`` or the environment.
        options: As :class:`LoaderConfig`.

    Raises:
        ValueError: From :class:`LoaderConfig`.
    """

    def __init__(
        self,
        dataset: ClipWebDataset | Iterable[Mapping[str, Any]],
        scorer: ClipScorer | None,
        *,
        world: World | None = None,
        **options: Any,
    ) -> None:
        self.dataset = dataset
        self.scorer = scorer
        self.config = LoaderConfig(**options)
        if scorer is None and self.config.threshold is not None:
            raise ValueError(f"threshold is {self.config.threshold}, but there is no scorer; pass threshold=None")
        self.world = world or getattr(dataset, "world", None)
        #: Batches that the ranks had ready when the last epoch ended and did not hand out (``end="sync"``).
        self.left_over = 0
        self._agreement: Agreement | None = None
        self._run: _Run | None = None
        self._next = _Mark.start(self._num_positions, getattr(dataset, "epoch", 0), FilterStats())
        self._remembered: deque[_Mark] = deque([self._next], maxlen=_NUM_REMEMBERED)

    @property
    def _num_positions(self) -> int:
        return max(1, self.config.num_workers)

    @property
    def stats(self) -> FilterStats:
        """Counts of all samples that this rank has scored since training began, those before a resume included."""
        return self._run.progress.stats if self._run else self._next.progress.stats

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at the start of this epoch; with ``end="repeat"``, where the stream is."""
        repeat = self.config.end == "repeat"
        self._begin_at(
            replace(self._next, batches=0) if repeat else _Mark.start(self._num_positions, epoch, self.stats)
        )

    def _begin_at(self, mark: "_Mark") -> None:
        self._next = mark
        self._run = None
        self._remembered.clear()
        self._remembered.append(mark)

    def __len__(self) -> int:
        """Batches per epoch, which is known for ``end="repeat"`` only."""
        if self.config.batches_per_epoch is None:
            raise TypeError("how many batches pass the filter is not known beforehand")
        return self.config.batches_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches of one epoch; after a ``break``, of the next one.

        Raises:
            StarvationError: When nothing is kept.
            RuntimeError: When another rank failed.
        """
        world = self.world or World.current()
        if self._agreement is None:
            self._agreement = Agreement(world)
        begin = self._next
        self._remembered.clear()
        self._remember(begin)
        run = self._run = _Run(self.dataset, self.scorer, self.config, world, begin)
        try:
            yield from self._hand_out(run, self._agreement)
        finally:
            run.close()

    def _hand_out(self, run: "_Run", agreement: Agreement) -> Iterator[dict[str, Any]]:
        batches = run.begun_at.batches
        while self.config.batches_per_epoch is None or batches < self.config.batches_per_epoch:
            try:
                batch = run.next_batch()
            except Exception:
                agreement.lowest(_FAILED)  # the other ranks must not wait for this one
                raise
            status = agreement.lowest(_READY if batch is not None else _OUT_OF_BATCHES)
            if status == _FAILED:
                raise RuntimeError("another rank's data loading failed; its own error says why")
            if status == _OUT_OF_BATCHES:
                self._finish_epoch(run, agreement, batches, unused=batch is not None)
                break
            batches += 1
            self._remember(run.mark(batches))
            yield batch  # type: ignore[misc]  # every rank has one
        # Only reached when the epoch was not broken off.
        self._remember(self._next)

    def _remember(self, mark: "_Mark") -> None:
        self._remembered.append(mark)
        repeat = self.config.end == "repeat"
        stats = mark.progress.stats
        self._next = replace(mark, batches=0) if repeat else _Mark.start(self._num_positions, mark.epoch + 1, stats)

    def _finish_epoch(self, run: "_Run", agreement: Agreement, batches: int, *, unused: bool) -> None:
        ready = math.ceil(run.num_ready / self.config.batch_size) + unused
        told = agreement.gather((ready, run.num_kept, run.num_seen))
        self.left_over = sum(ready for ready, _, _ in told)
        if batches == 0 and not any(kept for _, kept, _ in told):
            raise run.watch.starved(f"a whole epoch of {sum(seen for *_, seen in told):,} samples left none")
        if self.left_over:
            _log.warning(
                "the epoch ended after %d batches on every rank, when the first had no more; at least %d were ready "
                "and left over (by rank: %s). More shards, shuffling, or end='repeat' use them",
                batches,
                self.left_over,
                [ready for ready, _, _ in told],
            )

    # --- state ---

    def state_dict(self, *, after: int | None = None) -> dict[str, Any]:
        """Where this rank is, after the batch handed out last; holds positions only, never samples. JSON-ready.

        Args:
            after: Instead, after this many batches of the epoch, for a trainer that fetches ahead of the batch that it
                trains on. At most three batches back.

        Raises:
            ValueError: When the dataset is not a :class:`ClipWebDataset`, or ``after`` lies too far back.
        """
        settings = self._settings()
        marks = [mark for mark in self._remembered if after is None or mark.batches == after]
        if not marks:
            raise ValueError(
                f"the state after {after} batches is no longer known; {self._remembered[-1].batches} are out"
            )
        return {"version": _STATE_VERSION, "settings": settings, **marks[-1].to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, with the next iteration, where :meth:`state_dict` was called.

        Raises:
            ValueError: When the state is of another version, world, dataset or setting; with both values.
        """
        if state["version"] != _STATE_VERSION:
            raise ValueError(f"the state has version {state['version']}, this version reads {_STATE_VERSION}")
        here, there = self._settings(), state["settings"]
        differences = [
            f"{name} is {here[name]!r} here and {there.get(name)!r} in the state"
            for name in here
            if here[name] != there.get(name)
        ]
        if differences:
            raise ValueError("can't go on from this state: " + "; ".join(differences))
        self._begin_at(_Mark.from_json(state))

    def _settings(self) -> dict[str, Any]:
        """All that the order of batches depends on."""
        if not isinstance(self.dataset, ClipWebDataset):
            raise ValueError("only a loader of a ClipWebDataset can be resumed")
        world, config = self.world or World.current(), self.config
        names = "\n".join(public_url(url) for url in self.dataset.urls)
        return {
            "rank": world.rank,
            "world_size": world.world_size,
            "num_workers": config.num_workers,
            "dataset": f"{len(self.dataset.urls)} shards, {sha256(names.encode()).hexdigest()[:12]}",
            "shuffle": self.dataset.shuffle,
            "seed": self.dataset.seed,
            "caption": self.dataset.layout.caption,
            "threshold": config.threshold,
            "batch_size": config.batch_size,
            "score_batch_size": config.score_batch_size,
            "end": config.end,
            "weights": self.scorer and self.scorer.fingerprint["weights"],
        }


class _Run:
    """One iteration: reads and scores ahead, keeps and packs."""

    def __init__(
        self,
        dataset: ClipWebDataset | Iterable[Mapping[str, Any]],
        scorer: ClipScorer | None,
        config: LoaderConfig,
        world: World,
        begin: "_Mark",
    ) -> None:
        self._config, self._world = config, world
        self.begun_at = begin
        self.progress = begin.progress
        self.num_seen = self.num_kept = 0
        self._skip = begin.handed
        self._has_scores = scorer is not None
        self._last_kept_epoch = begin.progress.epoch
        self._rebatcher = Rebatcher(config.batch_size)
        self._waiting: deque[_Progress] = deque()
        self.watch = KeepRateWatch(config.threshold, config.starvation_limit)
        if isinstance(dataset, ClipWebDataset):
            batches = _stream(dataset, config, world, begin, pin_memory=torch.cuda.is_available())
            self._feed = Feed(batches, lambda batch: _score_stream_batch(scorer, batch))
        else:
            self._feed = Feed(dataset, lambda batch: _score_columns(scorer, batch))
        self._scored = iter(self._feed)

    def next_batch(self) -> dict[str, Any] | None:
        """The next training batch, None when the epoch has no more."""
        while not self._rebatcher.is_ready:
            scored = next(self._scored, None)
            if scored is None:
                break
            self._take_in(scored)
        if not self._rebatcher.num_rows or (self._config.drop_last and not self._rebatcher.is_ready):
            return None
        batch = self._rebatcher.pop()
        while len(self._waiting) > self._rebatcher.num_pieces:
            self._waiting.popleft()
        return batch

    def _take_in(self, scored: _Scored) -> None:
        threshold = self._config.threshold
        keep = passes(scored.scores, threshold) if threshold is not None else np.ones(len(scored.scores), dtype=bool)
        seen, kept = len(keep) + sum(scored.unusable.values()), int(keep.sum())
        dropped = Counter({**scored.unusable, DropReason.BELOW_THRESHOLD: len(keep) - kept})
        before = self.progress
        self.progress = before.advance(scored, FilterStats(seen=seen, kept=kept, dropped=+dropped))
        self.num_seen, self.num_kept = self.num_seen + seen, self.num_kept + kept
        self.watch.add(scored.scores, seen=seen, kept=kept)
        for url, why in scored.failures:
            _log.warning("a shard is left out: %s: %s", public_url(url), why)
        if kept:
            self._last_kept_epoch = self.progress.epoch
            self._push(scored, keep, kept, before)
        elif self.progress.epoch - self._last_kept_epoch > self._world.world_size:
            # Ranks take turns with the shards, so by now this one has read all of them.
            raise self.watch.starved(f"{self._world.world_size} whole epochs left none")

    def _push(self, scored: _Scored, keep: np.ndarray, num_rows: int, before: "_Progress") -> None:
        columns = take(scored.columns, np.flatnonzero(keep).tolist()) if num_rows < len(keep) else scored.columns
        scores = {"score": torch.from_numpy(scored.scores[keep])} if self._has_scores else {}
        self._rebatcher.push({**columns, **scores}, num_rows)
        self._waiting.append(before)
        if self._skip:
            self._rebatcher.skip(self._skip)
            self._skip = 0

    @property
    def num_ready(self) -> int:
        """Kept pairs that were not handed out."""
        return self._rebatcher.num_rows

    def mark(self, batches: int) -> "_Mark":
        """Where this run is, after so many batches of the epoch."""
        waiting = self._waiting[0] if self._waiting else self.progress
        handed = self._rebatcher.num_begun if self._waiting else 0
        return _Mark(progress=waiting, epoch=self.begun_at.epoch, handed=handed, batches=batches)

    def close(self) -> None:
        """Stop workers and thread."""
        self._feed.close()


def _stream(
    dataset: ClipWebDataset, config: LoaderConfig, world: World, begin: "_Mark", *, pin_memory: bool
) -> Iterable[StreamBatch]:
    stream = StreamWorker(
        dataset,
        world=world,
        num_workers=max(1, config.num_workers),
        batch_size=config.score_batch_size,
        epoch=begin.epoch,
        start=begin.progress.positions,
        first=begin.progress.next_worker,
        endless=config.end == "repeat",
    )
    return worker_loader(
        stream,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        in_order=True,
        multiprocessing_context=config.multiprocessing_context,
    )


def _score_stream_batch(scorer: ClipScorer | None, batch: StreamBatch) -> _Scored:
    usable = [row.reason is None for row in batch.rows]
    return _Scored(
        columns={
            **batch.views,
            "__key__": [row.key for row in batch.rows if row.reason is None],
            "__url__": list(compress(batch.urls, usable)),
        },
        scores=_scores(scorer, batch.pixel_values, batch.input_ids),
        unusable=Counter(row.reason for row in batch.rows if row.reason is not None),
        worker=batch.worker,
        after=batch.after,
        failures=tuple(batch.failures),
    )


def _score_columns(scorer: ClipScorer | None, batch: Mapping[str, Any]) -> _Scored:
    missing = {"pixel_values", "input_ids"} - set(batch)
    if missing:
        raise ValueError(f"a batch has the columns {sorted(batch)}, but no {' and no '.join(sorted(missing))}")
    scores = _scores(scorer, batch["pixel_values"], batch["input_ids"])
    return _Scored(columns=dict(batch), scores=scores, unusable={})


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
