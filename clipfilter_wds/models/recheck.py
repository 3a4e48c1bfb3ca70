"""Decides by fast scores what float32 scores would decide, and computes in float32 only what that takes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from clipfilter_wds.models.cosine import captions_of, cosines, num_captions
from clipfilter_wds.models.device import to_device
from clipfilter_wds.models.encoder import Check
from clipfilter_wds.models.forward_pool import ForwardPool, forward_pool
from clipfilter_wds.models.scorer import ClipScorer

T = TypeVar("T")

#: Samples that the error is first measured on. All pairings of images and captions are compared, so a few will do.
NUM_MEASURED = 32

#: How much wider the band is than the largest error seen, and the share of it that an error must reach to widen it.
_MARGIN, _WIDENS = 2.0, 0.75

#: The band before the error is known: no two cosines lie further apart, so everything is rechecked.
_WHOLE = 2.0

#: Share of the samples outside the band that are scored in float32 too, to see whether the band still holds.
_AUDITED = 1 / 1024

#: In float32, first the caption is computed again, then the image.
_NUM_TOWERS = 2

#: Batches that wait until their undecided scores fill a float32 batch.
_MOST_WAITING = 8


@dataclass(frozen=True, eq=False)
class BatchScores:
    """The scores of a batch.

    Attributes:
        scores: float32 ``[N]``: raw cosines.
        num_rechecked: How many of them were computed again in float32.
    """

    scores: np.ndarray
    num_rechecked: int = 0


class _Scored:
    """A batch with its fast scores, and with as many better ones as were needed so far.

    Attributes:
        scores: float32 ``[3, N]``: fast; with the caption in float32; with the image in float32 too. NaN where not
            computed.
        num_fp32: int64 ``[N]``: how many towers were computed in float32; indexes each sample's best score.
        caption_embeds: By row, the captions' embeddings in float32.
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
        """float32 ``[2, N]``: the errors of the fast scores of these samples, and of those with exact captions."""
        errors: np.ndarray = np.abs(self.scores[:_NUM_TOWERS, rows] - self.scores[_NUM_TOWERS, rows])
        return errors


class Recheck:
    """Scores batches so that comparing with the threshold decides what float32 would decide.

    Scores are first computed in the scorer's precision. One that lies within the *band* around the threshold, or is not
    finite, is computed again with its caption in float32, which removes most of the error for a quarter of the time. If
    it still lies within the narrower band of scores whose image alone is in low precision, the image is encoded in
    float32 too.

    A band is twice the largest such error among all pairings of the first 32 images and captions. A later error of more
    than three quarters of a band widens it to twice that error. Later errors are known of all samples whose images are
    rechecked, and of 1 in 1,024 of all others. (For the usual bf16 and fp16 models the errors are nearly normal, and a
    band is five to seven of their standard deviations.) With a scorer in float32 there is no band and nothing is
    rechecked.

    Args:
        scorer: The model.
        threshold: What scores are compared with; None rechecks only what is not finite.
        seed: Chooses the audited samples. No score depends on it.
    """

    def __init__(self, scorer: ClipScorer, threshold: float | None, *, seed: int = 0) -> None:
        self.scorer, self._is_exact = scorer, scorer.fast is scorer.exact
        # At a threshold of 0 or less everything is kept, whatever its score.
        self._threshold = threshold if threshold is not None and threshold > 0 else None
        self._random = np.random.default_rng(seed)
        self._num_measured = 0
        #: Of the band of fast scores, and of that of scores with the caption in float32.
        self._half_widths = [0.0] * _NUM_TOWERS

    @property
    def is_measured(self) -> bool:
        """Whether enough samples were seen to know the error."""
        return self._is_exact or self._num_measured >= NUM_MEASURED

    @property
    def band(self) -> float:
        """How far a score may be off float32's; one that is as close to the threshold is computed again."""
        return max(self._half_widths) if self.is_measured else _WHOLE

    def __call__(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> BatchScores:
        """Score N images, uint8 ``[N, 3, H, W]``, with their captions, int64 ``[N, L]`` or ``[N, K, L]``."""
        [(_, scores)] = self.map([None], lambda _: (pixel_values, input_ids))
        return scores

    def map(
        self, batches: Iterable[T], inputs: Callable[[T], tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[T, BatchScores]]:
        """Score batches, and yield each with its scores, in order.

        The next batches are started before the scores of the first are there. What has to be computed again waits until
        it fills a batch of a float32 tower, for at most :data:`_MOST_WAITING` batches.

        Args:
            batches: Anything that holds what is scored.
            inputs: Batch -> ``pixel_values`` and ``input_ids``.
        """
        started: deque[tuple[T, Callable[[], _Scored]]] = deque()
        waiting: deque[tuple[T, _Scored]] = deque()
        with forward_pool(self.scorer.device, self.scorer.fast.width) as pool:
            for batch in batches:
                started.append((batch, self._start(pool, *inputs(batch))))
                if len(started) > pool.num_ahead:
                    yield from self._settle(pool, waiting, *started.popleft())
            for batch, finish in started:
                yield from self._settle(pool, waiting, batch, finish)
            while waiting:
                self._recheck_oldest(pool, waiting)
                yield from self._decided(waiting)

    def measure(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> None:
        """Learn the error from the first of these samples, N images with their captions, unless it is known already."""
        if self.is_measured or not len(pixel_values):
            return
        pixel_values, input_ids = pixel_values[:NUM_MEASURED], input_ids[:NUM_MEASURED]
        if input_ids.ndim == 3:
            input_ids = input_ids[:, 0]  # a reduction of several similarities errs no more than the worst of them
        images, captions = self.scorer.fast(pixel_values, input_ids)
        exact_images, exact_captions = self.scorer.exact(pixel_values, input_ids)
        scores = torch.stack([images @ captions.T, images @ exact_captions.T])
        self._num_measured += len(pixel_values)
        self._learn((scores - exact_images @ exact_captions.T).abs().cpu().numpy())

    def _start(self, pool: ForwardPool, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> Callable[[], _Scored]:
        self.measure(pixel_values, input_ids)
        finish = pool.run(self._score_fast, pixel_values, input_ids, pool.raise_if_cancelled)
        fetch = _fetch(finish, self.scorer.device)
        is_audited = self._random.random(len(pixel_values)) < (0 if self._is_exact else _AUDITED)
        is_all_near = not self.is_measured  # as of now, whatever is known once the scores are there
        return lambda: _Scored(pixel_values, input_ids, *fetch(), is_audited=is_audited, is_all_near=is_all_near)

    def _score_fast(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, check: Check
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fast scores, and the embeddings of the images."""
        images, captions = self.scorer.fast(pixel_values, input_ids, check=check)
        return cosines(images, captions, input_ids, self.scorer.reduce), images

    def _settle(
        self, pool: ForwardPool, waiting: deque[tuple[T, _Scored]], batch: T, finish: Callable[[], _Scored]
    ) -> Iterator[tuple[T, BatchScores]]:
        """Let a batch wait, and yield those that need not."""
        waiting.append((batch, finish()))
        for num_fp32 in range(_NUM_TOWERS):
            while sum(int(self._todo(scored, num_fp32).sum()) for _, scored in waiting) >= self.scorer.exact.batch_rows:
                self._recheck(pool, waiting, num_fp32)
        while len(waiting) > _MOST_WAITING and self._is_undecided(waiting[0][1]):
            self._recheck_oldest(pool, waiting)
        yield from self._decided(waiting)

    def _recheck_oldest(self, pool: ForwardPool, waiting: deque[tuple[T, _Scored]]) -> None:
        """Run the float32 towers that the oldest batch needs, even if they are not full."""
        for num_fp32 in range(_NUM_TOWERS):
            if self._todo(waiting[0][1], num_fp32).any():
                self._recheck(pool, waiting, num_fp32)

    def _recheck(self, pool: ForwardPool, waiting: deque[tuple[T, _Scored]], num_fp32: int) -> None:
        """Run one batch of the next float32 tower, on the first samples that have this many and need it."""
        parts: list[tuple[_Scored, np.ndarray]] = []
        room = self.scorer.exact.batch_rows
        for _, scored in waiting:
            rows = np.flatnonzero(self._todo(scored, num_fp32))[:room]
            if len(rows):
                parts.append((scored, rows))
                room -= len(rows)
        if not parts:
            return
        scores = pool.run(self._score_again, parts, num_fp32, pool.raise_if_cancelled)()
        for scored, rows in parts:
            scored.scores[num_fp32 + 1, rows], scores = scores[: len(rows)], scores[len(rows) :]
            scored.num_fp32[rows] = num_fp32 + 1
            if num_fp32 + 1 == _NUM_TOWERS:
                self._learn(scored.errors(rows))

    def _score_again(self, parts: Sequence[tuple[_Scored, np.ndarray]], num_fp32: int, check: Check) -> np.ndarray:
        """Scores with one more tower in float32 than ``num_fp32``."""
        scorer, indices = self.scorer, [(scored, torch.from_numpy(rows)) for scored, rows in parts]
        input_ids = scorer.preprocess.tokenize.join([scored.input_ids[index] for scored, index in indices])
        places = [(scored.caption_embeds, row) for scored, rows in parts for row in rows.tolist()]
        if num_fp32 == 0:
            images = torch.cat([scored.image_embeds[to_device(index, scorer.device)] for scored, index in indices])
            embeds = scorer.exact.encode_text(captions_of(input_ids), check=check)
            for (of_batch, row), of_row in zip(places, embeds.split(num_captions(input_ids)), strict=True):
                of_batch[row] = of_row
        else:
            pixel_values = torch.cat([scored.pixel_values[index] for scored, index in indices])
            images = scorer.exact.encode_image(pixel_values, check=check)
        captions = torch.cat([of_batch[row] for of_batch, row in places])
        return cosines(images, captions, input_ids, scorer.reduce).cpu().numpy()

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
        """Which samples have this many float32 towers and need another; more than before, once a band is wider."""
        todo: np.ndarray = (self._is_near(scored, num_fp32) | scored.is_audited) & (scored.num_fp32 == num_fp32)
        return todo

    def _is_near(self, scored: _Scored, num_fp32: int) -> np.ndarray:
        """Which scores with this many towers in float32 might be decided otherwise in float32 throughout."""
        scores = scored.scores[num_fp32]
        if self._is_exact:
            return np.zeros(len(scores), dtype=bool)
        near: np.ndarray = ~np.isfinite(scores)
        if self._threshold is not None:
            band = _WHOLE if scored.is_all_near else self._half_widths[num_fp32]
            near |= np.abs(scores.astype(np.float64) - self._threshold) <= band
        return near

    def _learn(self, errors: np.ndarray) -> None:
        """Widen the bands by errors ``[2, ...]``, of fast scores and of those with the caption in float32."""
        for num_fp32, some in enumerate(errors):
            largest = float(some[np.isfinite(some)].max(initial=0.0))
            if largest > _WIDENS * self._half_widths[num_fp32]:
                self._half_widths[num_fp32] = _MARGIN * largest


def _fetch(
    finish: Callable[[], tuple[torch.Tensor, torch.Tensor]], device: torch.device
) -> Callable[[], tuple[np.ndarray, torch.Tensor]]:
    """Start copying scores to the host. Returns a function that waits for them; embeddings stay where they are."""
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
