"""Scores of a fast, inexact model -> the decisions that float32 makes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from clipfilter_wds.models.forward_pool import ForwardPool, forward_pool
from clipfilter_wds.models.scorer import ClipScorer

T = TypeVar("T")

#: Samples that the error is first measured on. All pairings of their images and captions count, so a few are enough.
NUM_MEASURED = 32

#: How much wider the band is than the largest error seen, and the share of it that an error must reach to widen it.
_MARGIN, _WIDENS = 2.0, 0.75

#: The band before the error is known: cosines can't lie further apart, so everything is rechecked.
_WHOLE = 2.0

#: Share of the samples outside the band that are scored in float32 as well, to see whether the band still holds.
_AUDITED = 1 / 1024

#: The caption's and then the image's are computed again in float32.
_NUM_TOWERS = 2

#: Batches that wait for those of their scores that are computed again.
_MOST_WAITING = 8


@dataclass(frozen=True, eq=False)
class BatchScores:
    """The scores of a batch: raw cosines, float32 ``[N]``; and how many of them were computed again in float32."""

    scores: np.ndarray
    num_rechecked: int = 0


class _Scored:
    """A batch whose fast scores are there, and of the better ones as many as were asked for.

    Attributes:
        scores: float32 ``[3, N]``: fast; with the caption in float32; with the image in float32 too.
        num_fp32: Which of them is the best that is known of each sample.
        caption_embeds: By row, the captions that were encoded in float32.
    """

    def __init__(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        fast: np.ndarray,
        image_embeds: torch.Tensor,
        *,
        is_audited: np.ndarray,
        is_all_near: bool,
    ) -> None:
        self.pixel_values, self.input_ids, self.image_embeds = pixel_values, input_ids, image_embeds
        self.is_audited, self.is_all_near = is_audited, is_all_near
        self.scores = np.stack([fast, *[np.full_like(fast, np.nan)] * _NUM_TOWERS])
        self.num_fp32 = np.zeros(len(fast), dtype=np.int64)
        self.caption_embeds: dict[int, torch.Tensor] = {}

    def errors(self, rows: np.ndarray) -> np.ndarray:
        """float32 ``[2, N]``: how far off samples were at first, and with their captions in float32."""
        errors: np.ndarray = np.abs(self.scores[:_NUM_TOWERS, rows] - self.scores[_NUM_TOWERS, rows])
        return errors


class Recheck:
    """Scores batches so that comparing with the threshold decides what float32 would decide.

    A score is computed in the scorer's precision, and where it lies within the *band* around the threshold or is not
    finite, again with its caption in float32: that takes a quarter of the time and most of the error away. Where it
    still lies within the narrower band of scores of which only the image is in low precision, the image is encoded in
    float32 too. A band is twice the largest such error among all pairings of the first 32 images and captions; and
    twice the error of a later sample, when that is over three quarters of the band. Later errors are known of all whose
    images are rechecked, and of a share of 1/1024 of all other samples. (For the usual bf16 and fp16 models the errors
    are nearly normal, and a band is five to seven of their standard deviations.) With a scorer in float32 there is no
    band and nothing is rechecked.

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
        #: Of the bands: of fast scores, and of those with the caption in float32.
        self._half_widths = [0.0] * _NUM_TOWERS

    @property
    def is_measured(self) -> bool:
        """Whether enough samples were seen to know the error."""
        return self.scorer.is_exact or self._num_measured >= NUM_MEASURED

    @property
    def band(self) -> float:
        """Scores may be this far off float32's; those that are no farther from the threshold are computed again."""
        return max(self._half_widths) if self.is_measured else _WHOLE

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
        with forward_pool(self.scorer.device, self.scorer.width) as streams:
            for batch in batches:
                started.append((batch, self._start(streams, *inputs(batch))))
                if len(started) > streams.num_ahead:
                    yield from self._settle(streams, waiting, *started.popleft())
            for batch, finish in started:
                yield from self._settle(streams, waiting, batch, finish)
            while waiting:
                self._recheck_oldest(streams, waiting)
                yield from self._decided(waiting)

    def measure(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> None:
        """Learn the error from the first of these samples, N images and N captions, unless it is known already."""
        if self.is_measured or not len(pixel_values):
            return
        pixel_values, input_ids, scorer = pixel_values[:NUM_MEASURED], input_ids[:NUM_MEASURED], self.scorer
        if input_ids.ndim == 3:
            input_ids = input_ids[:, 0]  # a reduction of several similarities errs no more than the worst of them
        with torch.inference_mode():
            image_embeds, captions = scorer.encode_image(pixel_values), scorer.encode_text_fp32(input_ids).T
            exact = scorer.encode_image_fp32(pixel_values) @ captions
            scores = torch.stack([image_embeds @ scorer.encode_text(input_ids).T, image_embeds @ captions])
        self._num_measured += len(pixel_values)
        self._learn((scores - exact).abs().cpu().numpy())

    def _start(
        self, streams: ForwardPool, pixel_values: torch.Tensor, input_ids: torch.Tensor
    ) -> Callable[[], _Scored]:
        self.measure(pixel_values, input_ids)
        fetch = _fetch(streams.run(self._scores_and_embeds, pixel_values, input_ids), self.scorer.device)
        is_audited = self._random.random(len(pixel_values)) < (0 if self.scorer.is_exact else _AUDITED)
        is_all_near = not self.is_measured  # as long as it is not, whatever is known when the scores are there
        return lambda: _Scored(pixel_values, input_ids, *fetch(), is_audited=is_audited, is_all_near=is_all_near)

    @torch.inference_mode()
    def _scores_and_embeds(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = self.scorer.encode_image(pixel_values) if len(pixel_values) else torch.empty(0)
        return self.scorer(pixel_values, input_ids, image_embeds=embeds), embeds

    def _settle(
        self, streams: ForwardPool, waiting: deque[tuple[T, _Scored]], batch: T, finish: Callable[[], _Scored]
    ) -> Iterator[tuple[T, BatchScores]]:
        """Let a batch wait, and hand out those that need not."""
        waiting.append((batch, finish()))
        for num_fp32 in range(_NUM_TOWERS):
            while sum(int(self._todo(scored, num_fp32).sum()) for _, scored in waiting) >= self.scorer.fp32_rows:
                self._recheck(streams, waiting, num_fp32)
        while len(waiting) > _MOST_WAITING and self._is_undecided(waiting[0][1]):
            self._recheck_oldest(streams, waiting)
        yield from self._decided(waiting)

    def _recheck_oldest(self, streams: ForwardPool, waiting: deque[tuple[T, _Scored]]) -> None:
        """Don't wait for more than there are, with the towers that the oldest batch needs."""
        for num_fp32 in range(_NUM_TOWERS):
            if self._todo(waiting[0][1], num_fp32).any():
                self._recheck(streams, waiting, num_fp32)

    def _recheck(self, streams: ForwardPool, waiting: deque[tuple[T, _Scored]], num_fp32: int) -> None:
        """Fill one batch of a float32 tower with the first that have to be computed again, and are as exact as that."""
        parts: list[tuple[_Scored, np.ndarray]] = []
        room = self.scorer.fp32_rows
        for _, scored in waiting:
            rows = np.flatnonzero(self._todo(scored, num_fp32))[:room]
            if len(rows):
                parts.append((scored, rows))
                room -= len(rows)
        if not parts:
            return
        scores = streams.run(self._scores_fp32, parts, num_fp32)()
        for scored, rows in parts:
            scored.scores[num_fp32 + 1, rows], scores = scores[: len(rows)], scores[len(rows) :]
            scored.num_fp32[rows] = num_fp32 + 1
            if num_fp32 + 1 == _NUM_TOWERS:
                self._learn(scored.errors(rows))

    @torch.inference_mode()
    def _scores_fp32(self, parts: Sequence[tuple[_Scored, np.ndarray]], num_fp32: int) -> np.ndarray:
        scorer, indices = self.scorer, [(scored, torch.from_numpy(rows)) for scored, rows in parts]
        input_ids = scorer.preprocess.tokenize.join([scored.input_ids[index] for scored, index in indices])
        places = [(scored.caption_embeds, row) for scored, rows in parts for row in rows.tolist()]
        if num_fp32 == 0:
            images = torch.cat([scored.image_embeds[scorer.on_device(index)] for scored, index in indices])
            for (embeds, row), of_row in zip(places, scorer.encode_captions_fp32(input_ids), strict=True):
                embeds[row] = of_row
        else:
            images = scorer.encode_image_fp32(torch.cat([scored.pixel_values[index] for scored, index in indices]))
        return scorer.score_embeds(images, [embeds[row] for embeds, row in places], input_ids).cpu().numpy()

    def _decided(self, waiting: deque[tuple[T, _Scored]]) -> Iterator[tuple[T, BatchScores]]:
        while waiting and not self._is_undecided(waiting[0][1]):
            batch, scored = waiting.popleft()
            scores, num_rechecked = scored.scores[_NUM_TOWERS], 0
            for num_fp32 in reversed(range(_NUM_TOWERS)):
                near = self._is_near(scored, num_fp32)
                scores, num_rechecked = np.where(near, scores, scored.scores[num_fp32]), int(near.sum())
            yield batch, BatchScores(scores, num_rechecked)

    def _is_undecided(self, scored: _Scored) -> bool:
        return any(self._todo(scored, num_fp32).any() for num_fp32 in range(_NUM_TOWERS))

    def _todo(self, scored: _Scored, num_fp32: int) -> np.ndarray:
        """Which samples need another tower in float32 than these; more than before, once a band is wider."""
        todo: np.ndarray = (self._is_near(scored, num_fp32) | scored.is_audited) & (scored.num_fp32 == num_fp32)
        return todo

    def _is_near(self, scored: _Scored, num_fp32: int) -> np.ndarray:
        """Which scores, with so many towers in float32, might be decided otherwise with all of them in it."""
        scores = scored.scores[num_fp32]
        if self.scorer.is_exact:
            return np.zeros(len(scores), dtype=bool)
        near: np.ndarray = ~np.isfinite(scores)
        if self._threshold is not None:
            band = _WHOLE if scored.is_all_near else self._half_widths[num_fp32]
            near |= np.abs(scores.astype(np.float64) - self._threshold) <= band
        return near

    def _learn(self, errors: np.ndarray) -> None:
        """From errors ``[2, ...]``, of fast scores and of those with the caption in float32."""
        for num_fp32, some in enumerate(errors):
            largest = float(some[np.isfinite(some)].max(initial=0.0))
            if largest > _WIDENS * self._half_widths[num_fp32]:
                self._half_widths[num_fp32] = _MARGIN * largest


def _fetch(
    finish: Callable[[], tuple[torch.Tensor, torch.Tensor]], device: torch.device
) -> Callable[[], tuple[np.ndarray, torch.Tensor]]:
    """Begin to copy scores to the host; the function that comes back waits for them. Embeddings stay where they are."""
    if device.type != "cuda":

        def finished() -> tuple[np.ndarray, torch.Tensor]:
            scores, image_embeds = finish()
            return scores.cpu().numpy(), image_embeds

        return finished
    scores, image_embeds = finish()
    host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
    host.copy_(scores, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(scores.device))

    def wait() -> tuple[np.ndarray, torch.Tensor]:
        copied.synchronize()
        return host.numpy(), image_embeds

    return wait
