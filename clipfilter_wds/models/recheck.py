"""Decides by fast scores what float32 scores would decide, and computes in float32 only what that takes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from clipfilter_wds.models.cosine import captions_of, cosines, num_captions, unit_embeddings
from clipfilter_wds.models.device import fetching, to_device
from clipfilter_wds.models.encoder import Check
from clipfilter_wds.models.forward_pool import ForwardPool, forward_pool
from clipfilter_wds.models.out_of_memory import FEWEST, memory_for
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.models.undecided import NUM_TOWERS, Undecided, first_places
from clipfilter_wds.preprocess.packed import Images

T = TypeVar("T")
U = TypeVar("U")

#: Samples that the error is first measured on. All pairings of images and captions are compared, so a few will do.
NUM_MEASURED = FEWEST

#: How much wider the band is than the largest error seen, and the share of it that an error must reach to widen it.
_MARGIN, _WIDENS = 2.0, 0.75

#: The band before the error is known: no two cosines lie further apart, so everything is rechecked.
_WHOLE = 2.0

#: Share of the samples outside the band that are scored in float32 too, to see whether the band still holds.
_AUDITED = 1 / 1024

#: Samples that wait until the undecided ones among them, or before them, fill a float32 batch.
_MOST_WAITING = 512

#: How much a float32 score may be off by rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class BatchScores:
    """The scores of a batch.

    Attributes:
        scores: float32 ``[N]``: raw cosines.
        num_rechecked: How many of them were computed again in float32.
        embeddings: Of images and captions, L2-normalised, ``[2, N, D]``, where they were asked for: the fast ones, also
            of samples whose scores were computed again.
    """

    scores: np.ndarray
    num_rechecked: int = 0
    embeddings: np.ndarray | None = None


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
        embeddings: Give the embeddings too, in this type.
    """

    def __init__(
        self, scorer: ClipScorer, threshold: float | None, *, seed: int = 0, embeddings: torch.dtype | None = None
    ) -> None:
        self.scorer, self._is_exact = scorer, scorer.fast is scorer.exact
        # At a threshold of 0 or less everything is kept, whatever its score.
        self._threshold = threshold if threshold is not None and threshold > 0 else None
        self._random = np.random.default_rng(seed)
        self._embeddings = embeddings
        self._num_measured = 0
        #: Of the band of fast scores, and of that of scores with the caption in float32.
        self._half_widths = [0.0] * NUM_TOWERS

    @property
    def is_measured(self) -> bool:
        """Whether enough samples were seen to know the error."""
        return self._is_exact or self._num_measured >= NUM_MEASURED

    @property
    def band(self) -> float:
        """How far a score may be off float32's; one that is as close to the threshold is computed again."""
        return max(self._half_widths) if self.is_measured else _WHOLE

    def __call__(self, pixel_values: Images, input_ids: torch.Tensor) -> BatchScores:
        """Score N images, uint8 ``[N, 3, H, W]`` or packed, with their captions, int64 ``[N, L]`` or ``[N, K, L]``."""
        [(_, scores)] = self.map([None], lambda _: (pixel_values, input_ids), lambda _, may_be_kept: None)
        return scores

    def map(
        self,
        batches: Iterable[T],
        inputs: Callable[[T], tuple[Images, torch.Tensor]],
        hold: Callable[[T, np.ndarray], U],
    ) -> Iterator[tuple[U, BatchScores]]:
        """Score batches, and yield what is held of each with its scores, in order.

        The next batches are started before the scores of the first are there. What has to be computed again waits until
        it fills a batch of a float32 tower, while at most :data:`_MOST_WAITING` samples wait. The device always has
        work while results are waited for.

        Args:
            batches: Anything that holds what is scored.
            inputs: Batch -> ``pixel_values`` and ``input_ids``.
            hold: Batch, and which of its samples may be kept, bool ``[N]`` -> what is to be yielded. Called when the
                fast scores are there. The memory of the inputs is not used after that.
        """
        started: deque[Callable[[], None]] = deque()
        waiting: deque[tuple[U, Undecided]] = deque()
        with forward_pool(self.scorer.device, self.scorer.fast.width) as pool:
            for batch in batches:
                started.append(self._start(pool, waiting, batch, inputs, hold))
                while len(started) > pool.num_ahead:
                    started.popleft()()
                    started.extend(self._rechecks(pool, waiting, most_waiting=_MOST_WAITING))
                    yield from self._decided(waiting)
            while started or waiting:
                if started:
                    started.popleft()()
                started.extend(self._rechecks(pool, waiting, most_waiting=_MOST_WAITING if started else 0))
                yield from self._decided(waiting)

    def measure(self, pixel_values: Images, input_ids: torch.Tensor) -> None:
        """Learn the error from the first of these samples, N images with their captions, unless it is known already."""
        if self.is_measured or not len(pixel_values):
            return
        pixel_values, input_ids = self.scorer.views(pixel_values[:NUM_MEASURED]), input_ids[:NUM_MEASURED]
        if input_ids.ndim == 3:
            input_ids = input_ids[:, 0]  # a reduction of several similarities errs no more than the worst of them
        with memory_for(len(pixel_values), self.scorer.device):
            images, captions = self.scorer.fast(pixel_values, input_ids)
            exact_images, exact_captions = self.scorer.exact(pixel_values, input_ids)
            with torch.autocast(self.scorer.device.type, enabled=False):  # which there may be around a training loop
                scores = torch.stack([images @ captions.T, images @ exact_captions.T])
                errors = (scores - exact_images @ exact_captions.T).abs().cpu().numpy()
        self._num_measured += len(pixel_values)
        self._learn(errors)

    def _start(
        self,
        pool: ForwardPool,
        waiting: "deque[tuple[U, Undecided]]",
        batch: T,
        inputs: Callable[[T], tuple[Images, torch.Tensor]],
        hold: Callable[[T, np.ndarray], U],
    ) -> Callable[[], None]:
        """Start the fast scores of a batch. Returns what waits for them, and then has the batch wait for float32."""
        images, input_ids = inputs(batch)
        room = partial(memory_for, len(images), self.scorer.device)
        with room():
            pixel_values = self.scorer.views(images)
        self.measure(pixel_values, input_ids)
        with room():
            is_audited = self._random.random(len(pixel_values)) < (0 if self._is_exact else _AUDITED)
            is_all_near = not self.is_measured  # as of now, whatever is known once the scores are there
            scored = pool.run(self._score_fast, pixel_values, input_ids, pool.raise_if_cancelled)
            fetch = fetching(scored, self.scorer.device)

        def finish() -> None:
            with room():
                (scores, *embeddings), image_embeds = fetch()
            is_near = self._is_near(scores, _WHOLE if is_all_near else self._half_widths[0])
            undecided = Undecided(
                scores, is_near, is_audited, pixel_values, input_ids, image_embeds, is_all_near=is_all_near
            )
            undecided.embeddings = embeddings[0] if embeddings else None
            may_be_kept = is_near if self._threshold is None else is_near | (scores >= self._threshold - _ROUNDING)
            waiting.append((hold(batch, may_be_kept | (self._threshold is None)), undecided))

        return finish

    def _score_fast(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, check: Check
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Fast scores and, where asked for, both embeddings; and the embeddings of the images as they are."""
        images, captions = self.scorer.fast(pixel_values, input_ids, check=check)
        found = [cosines(images, captions, input_ids, self.scorer.reduce)]
        if self._embeddings is not None:
            units = unit_embeddings(images, captions, input_ids, self.scorer.reduce)
            found.append(units.to(self._embeddings))
        return found, images

    def _rechecks(
        self, pool: ForwardPool, waiting: "deque[tuple[U, Undecided]]", *, most_waiting: int
    ) -> Iterator[Callable[[], None]]:
        """Start the float32 towers that can be filled, and those of the oldest batch if too many samples wait."""
        batches = [undecided for _, undecided in waiting]
        for num_fp32 in range(NUM_TOWERS):
            while sum(int(self._todo(each, num_fp32).sum()) for each in batches) >= self.scorer.exact.batch_rows:
                yield self._recheck(pool, batches, num_fp32)
        if sum(each.num_samples for each in batches) > most_waiting:
            for num_fp32 in range(NUM_TOWERS):
                if self._todo(batches[0], num_fp32).any():
                    yield self._recheck(pool, batches, num_fp32)

    def _recheck(self, pool: ForwardPool, batches: Sequence[Undecided], num_fp32: int) -> Callable[[], None]:
        """Start one batch of the next float32 tower, on the first samples that have this many and need it."""
        todo = [self._todo(each, num_fp32) for each in batches]
        found = zip(batches, first_places(todo, self.scorer.exact.batch_rows), strict=True)
        parts = [(each, places) for each, places in found if len(places)]
        for each, places in parts:
            each.is_busy[places] = True
        room = partial(memory_for, max(each.num_samples for each in batches), self.scorer.device)
        with room():
            scored = pool.run(self._score_again, parts, num_fp32, pool.raise_if_cancelled)
            fetch = fetching(lambda: ([scored()], None), self.scorer.device)

        def finish() -> None:
            with room():
                [scores], _ = fetch()
            for each, places in parts:
                each.scores[num_fp32 + 1, places], scores = scores[: len(places)], scores[len(places) :]
                each.num_fp32[places] = num_fp32 + 1
                each.is_busy[places] = False
                if num_fp32 + 1 == NUM_TOWERS:
                    self._learn(each.errors(places))

        return finish

    def _score_again(self, parts: Sequence[tuple[Undecided, np.ndarray]], num_fp32: int, check: Check) -> torch.Tensor:
        """Scores with one more tower in float32 than ``num_fp32``."""
        scorer, indices = self.scorer, [(each, torch.from_numpy(places)) for each, places in parts]
        input_ids = scorer.preprocess.tokenize.join([each.input_ids[index] for each, index in indices])
        of_rows = [(each.caption_embeds, place) for each, places in parts for place in places.tolist()]
        if num_fp32 == 0:
            images = torch.cat([each.image_embeds[to_device(index, scorer.device)] for each, index in indices])
            embeds = scorer.exact.encode_text(captions_of(input_ids), check=check)
            for (of_batch, place), of_row in zip(of_rows, embeds.split(num_captions(input_ids)), strict=True):
                of_batch[place] = of_row
        else:
            pixel_values = [each.pixel_values[to_device(index, each.pixel_values.device)] for each, index in indices]
            images = scorer.exact.encode_image(torch.cat(pixel_values), check=check)
        captions = torch.cat([of_batch[place] for of_batch, place in of_rows])
        return cosines(images, captions, input_ids, scorer.reduce)

    def _decided(self, waiting: "deque[tuple[U, Undecided]]") -> Iterator[tuple[U, BatchScores]]:
        while waiting:
            held, undecided = waiting[0]
            if undecided.is_busy.any() or any(self._todo(undecided, number).any() for number in range(NUM_TOWERS)):
                return
            waiting.popleft()
            scores = undecided.final_scores(np.where(self._is_near_still(undecided), 2, 1))
            yield held, BatchScores(scores, int(undecided.is_near.sum()), undecided.embeddings)

    def _todo(self, undecided: Undecided, num_fp32: int) -> np.ndarray:
        """Which samples have this many float32 towers and need another; more than before, once a band is wider."""
        todo: np.ndarray = (undecided.num_fp32 == num_fp32) & ~undecided.is_busy
        if num_fp32 == 1:
            todo &= undecided.is_audited | self._is_near_still(undecided)
        return todo

    def _is_near_still(self, undecided: Undecided) -> np.ndarray:
        """Which scores with the caption in float32 might be decided otherwise with the image in float32 too."""
        return self._is_near(undecided.scores[1], _WHOLE if undecided.is_all_near else self._half_widths[1])

    def _is_near(self, scores: np.ndarray, half_width: float) -> np.ndarray:
        """Which scores might be decided otherwise if they are off by up to ``half_width``."""
        if self._is_exact:
            return np.zeros(len(scores), dtype=bool)
        near: np.ndarray = ~np.isfinite(scores)
        if self._threshold is not None:
            near |= np.abs(scores.astype(np.float64) - self._threshold) <= half_width
        return near

    def _learn(self, errors: np.ndarray) -> None:
        """Widen the bands by errors ``[2, ...]``, of fast scores and of those with the caption in float32."""
        for num_fp32, some in enumerate(errors):
            largest = float(some[np.isfinite(some)].max(initial=0.0))
            if largest > _WIDENS * self._half_widths[num_fp32]:
                self._half_widths[num_fp32] = _MARGIN * largest
