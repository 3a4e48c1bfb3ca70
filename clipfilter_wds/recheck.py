"""Scores of a fast, inexact model -> the decisions that float32 makes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from clipfilter_wds.scorer import ClipScorer
from clipfilter_wds.streams import Streams, forward_streams

T = TypeVar("T")

#: Samples that the error is first measured on. All pairings of their images and captions count, so a few are enough.
NUM_MEASURED = 32

#: How much wider the band is than the largest error seen, and the share of it that an error must reach to widen it.
_MARGIN, _WIDENS = 2.0, 0.75

#: The band before the error is known: cosines can't lie further apart, so everything is rechecked.
_WHOLE = 2.0

#: Share of the samples outside the band that are scored in float32 as well, to see whether the band still holds.
_AUDITED = 1 / 1024

#: Batches that wait for those of their scores that are computed again.
_MOST_WAITING = 8


@dataclass(frozen=True, eq=False)
class BatchScores:
    """The scores of a batch: raw cosines, float32 ``[N]``; and how many of them were computed again in float32."""

    scores: np.ndarray
    num_rechecked: int = 0


@dataclass(eq=False)
class _Scored:
    """A batch whose fast scores are there, and of the float32 ones as many as were asked for."""

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    fast: np.ndarray
    is_audited: np.ndarray
    is_all_near: bool

    def __post_init__(self) -> None:
        self.exact = np.full_like(self.fast, np.nan)
        self.is_known = np.zeros(len(self.fast), dtype=bool)


class Recheck:
    """Scores batches so that comparing with the threshold decides what float32 would decide.

    A score is computed in the scorer's precision, and again in float32 where it lies within the *band* around the
    threshold or is not finite. The band is twice the largest error among all pairings of the first 32 images and
    captions; and twice the error of a later sample, when that is over three quarters of the band. Later errors are
    known of everything that is rechecked, and of a share of 1/1024 of all other samples. (For the usual bf16 and fp16
    models the errors are nearly normal, and the band is six to seven of their standard deviations.) With a scorer in
    float32 there is no band and nothing is rechecked.

    Args:
        scorer: The model.
        threshold: None rechecks only what is not finite.
        seed: Of the choice of the audited samples, which no score depends on.
    """

    def __init__(self, scorer: ClipScorer, threshold: float | None, *, seed: int = 0) -> None:
        self.scorer = scorer
        # All pass at a threshold of 0 or less, whatever their scores.
        self._threshold = threshold if threshold is not None and threshold > 0 else None
        self._random = np.random.default_rng(seed)
        self._num_measured = 0
        self._half_width = 0.0

    @property
    def is_measured(self) -> bool:
        """Whether enough samples were seen to know the error."""
        return self.scorer.is_exact or self._num_measured >= NUM_MEASURED

    @property
    def band(self) -> float:
        """Scores this close to the threshold, or closer, are computed again."""
        return self._half_width if self.is_measured else _WHOLE

    def __call__(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> BatchScores:
        """Score N images, uint8 ``[N, 3, H, W]``, with their captions, int64 ``[N, L]`` or ``[N, K, L]``."""
        [(_, scores)] = self.map([None], lambda _: (pixel_values, input_ids))
        return scores

    def map(
        self, batches: Iterable[T], inputs: Callable[[T], tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[T, BatchScores]]:
        """Score batches one after another.

        The next batches are begun before the scores of the first are there. What has to be computed again waits until
        it fills a batch of the float32 model, for at most :data:`_MOST_WAITING` batches.

        Args:
            batches: Anything that holds what is scored.
            inputs: Batch -> ``pixel_values`` and ``input_ids``.
        """
        started: deque[tuple[T, Callable[[], _Scored]]] = deque()
        waiting: deque[tuple[T, _Scored]] = deque()
        with forward_streams(self.scorer.device, self.scorer.width) as streams:
            for batch in batches:
                started.append((batch, self._start(streams, *inputs(batch))))
                if len(started) > streams.num_ahead:
                    yield from self._settle(streams, waiting, *started.popleft())
            for batch, finish in started:
                yield from self._settle(streams, waiting, batch, finish)
            while waiting:
                self._recheck(streams, waiting)
                yield from self._decided(waiting)

    def measure(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> None:
        """Learn the error from the first of these samples, N images and N captions, unless it is known already."""
        if self.is_measured or not len(pixel_values):
            return
        pixel_values, input_ids, scorer = pixel_values[:NUM_MEASURED], input_ids[:NUM_MEASURED], self.scorer
        if input_ids.ndim == 3:
            input_ids = input_ids[:, 0]  # a reduction of several similarities errs no more than the worst of them
        with torch.inference_mode():
            fast = scorer.encode_image(pixel_values) @ scorer.encode_text(input_ids).T
            exact = scorer.encode_image_fp32(pixel_values) @ scorer.encode_text_fp32(input_ids).T
        self._num_measured += len(pixel_values)
        self._learn((fast - exact).abs().cpu().numpy())

    def _start(self, streams: Streams, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> Callable[[], _Scored]:
        self.measure(pixel_values, input_ids)
        fetch = _fetch(streams.run(self.scorer, pixel_values, input_ids), self.scorer.device)
        audited = self._random.random(len(pixel_values)) < (0 if self.scorer.is_exact else _AUDITED)
        is_all_near = not self.is_measured  # as long as it is not, whatever is known when the scores are there
        return lambda: _Scored(pixel_values, input_ids, fetch(), audited, is_all_near)

    def _settle(
        self, streams: Streams, waiting: deque[tuple[T, _Scored]], batch: T, finish: Callable[[], _Scored]
    ) -> Iterator[tuple[T, BatchScores]]:
        """Let a batch wait, and hand out those that need not."""
        waiting.append((batch, finish()))
        while len(waiting) > _MOST_WAITING or self._num_todo(waiting) >= self.scorer.fp32_rows:
            self._recheck(streams, waiting)
            yield from self._decided(waiting)
        yield from self._decided(waiting)

    def _num_todo(self, waiting: deque[tuple[T, _Scored]]) -> int:
        return sum(int(self._todo(scored).sum()) for _, scored in waiting)

    def _recheck(self, streams: Streams, waiting: deque[tuple[T, _Scored]]) -> None:
        """Fill one batch of the float32 model with the first that have to be computed again."""
        parts: list[tuple[_Scored, np.ndarray]] = []
        room = self.scorer.fp32_rows
        for _, scored in waiting:
            rows = np.flatnonzero(self._todo(scored))[:room]
            if len(rows):
                parts.append((scored, rows))
                room -= len(rows)
        if not parts:
            return
        pixel_values = torch.cat([scored.pixel_values[torch.from_numpy(rows)] for scored, rows in parts])
        input_ids = [scored.input_ids[torch.from_numpy(rows)] for scored, rows in parts]
        joined = self.scorer.preprocess.tokenize.join(input_ids)
        exact = streams.run(self.scorer.score_fp32, pixel_values, joined)().cpu().numpy()
        for scored, rows in parts:
            scored.exact[rows], exact = exact[: len(rows)], exact[len(rows) :]
            scored.is_known[rows] = True
            self._learn(np.abs(scored.fast[rows] - scored.exact[rows]))

    def _decided(self, waiting: deque[tuple[T, _Scored]]) -> Iterator[tuple[T, BatchScores]]:
        while waiting and not self._todo(waiting[0][1]).any():
            batch, scored = waiting.popleft()
            near = self._is_near(scored)
            yield batch, BatchScores(np.where(near, scored.exact, scored.fast), int(near.sum()))

    def _todo(self, scored: _Scored) -> np.ndarray:
        """Which scores are needed in float32 and not known; more than before, once the band is wider."""
        todo: np.ndarray = (self._is_near(scored) | scored.is_audited) & ~scored.is_known
        return todo

    def _is_near(self, scored: _Scored) -> np.ndarray:
        if self.scorer.is_exact:
            return np.zeros(len(scored.fast), dtype=bool)
        near: np.ndarray = ~np.isfinite(scored.fast)
        if self._threshold is not None:
            band = _WHOLE if scored.is_all_near else self.band
            near |= np.abs(scored.fast.astype(np.float64) - self._threshold) <= band
        return near

    def _learn(self, errors: np.ndarray) -> None:
        largest = float(errors[np.isfinite(errors)].max(initial=0.0))
        if largest > _WIDENS * self._half_width:
            self._half_width = _MARGIN * largest


def _fetch(finish: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], np.ndarray]:
    """Begin to copy scores to the host; the function that comes back waits for them."""
    if device.type != "cuda":
        return lambda: finish().cpu().numpy()
    scores = finish()
    host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
    host.copy_(scores, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(scores.device))

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait
