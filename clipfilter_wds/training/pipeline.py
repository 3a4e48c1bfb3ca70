"""Filters in somebody else's pipeline: a stage between their loader and their training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from clipfilter_wds.models.batch_size import default_batch_size
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.options import check_whole_number, plain, refuse_name
from clipfilter_wds.scores.kind import COSINES, AutoThreshold
from clipfilter_wds.training.columns import INPUTS, is_sample, score_columns
from clipfilter_wds.training.keep_rate import KeepRateWatch
from clipfilter_wds.training.rebatch import take
from clipfilter_wds.types import FilterStats

if TYPE_CHECKING:
    from clipfilter_wds.models.scorer import ClipScorer

T = TypeVar("T")

#: The column of a batch of samples that holds them.
_SAMPLES = "sample"


class clip_filter:  # noqa: N801  # a stage of a pipeline, in lower case as webdataset's are
    """Keeps the pairs whose caption describes the image: a stage for a webdataset pipeline, or around any iterable.

    ``wds.WebLoader(pipeline, batch_size=None).compose(clip_filter(scorer)).unbatched().batched(256)``, or
    ``for batch in clip_filter(scorer)(loader)``. Decisions are those of float32, as with a ``ClipFilterLoader``, which
    also makes full batches, scores ahead in a thread, keeps ranks in step, and resumes.

    It takes batches, samples, or lists of samples: dicts with ``pixel_values``, ``input_ids`` and ``reason`` as
    ``scorer.preprocess`` makes them, and any other columns. It gives the same without what is dropped, in order, and
    with ``score`` (raw cosine, float32 ``[N]``) in place of ``reason``. A batch of which nothing is kept is left out.

    Args:
        scorer: The model.
        threshold: Keep a pair when its cosine similarity, clipped to [0, 1], is at least this; ``auto`` is 0.25. None
            keeps all pairs and only adds their scores.
        columns: The names of a tuple's columns, where batches or samples are tuples. What it gives are tuples of the
            same columns, with the score where the reason was.
        batch_size: How many single samples are scored together; by default as many as suit the model on its device, 64
            on a CPU. Batches are scored as they come.
        starvation_limit: Raise an error after this many samples in a row of which none is kept.

    Attributes:
        stats: Counts of all samples that were scored, in all iterations.

    Raises:
        ValueError: When an option can't be used.
        TypeError: When one is no number, or the scorer is a name.
    """

    def __init__(
        self,
        scorer: "ClipScorer",
        *,
        threshold: float | AutoThreshold | None = "auto",
        columns: Sequence[str] | None = None,
        batch_size: int | None = None,
        starvation_limit: int = 100_000,
    ) -> None:
        refuse_name("scorer", scorer, "a ClipScorer of that model")
        threshold = COSINES.resolve_threshold(plain(threshold))
        if columns is not None and (missing := set(INPUTS) - set(columns)):
            raise ValueError(f"columns are {list(columns)}; a filter also needs {' and '.join(sorted(missing))}")
        if batch_size is not None:
            check_whole_number("batch_size", batch_size, 1)
        check_whole_number("starvation_limit", starvation_limit, 1)
        self.stats = FilterStats()
        self._scorer, self._threshold, self._columns = scorer, threshold, columns
        self._batch_size = batch_size or default_batch_size(scorer.device, scorer.fast.width)
        self._recheck = Recheck(scorer, threshold)
        self._watch = KeepRateWatch(threshold, starvation_limit)

    def __repr__(self) -> str:
        return f"clip_filter({self._scorer.model_name!r}, threshold={self._threshold}, stats={self.stats})"

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        """Filter batches, samples, or lists of samples.

        Raises:
            StarvationError: When nothing is kept.
            ValueError: When a column is missing.
            TypeError: When an item is none of these.
        """
        before, iterator = self.stats, iter(items)
        for first in iterator:
            yield from self._filtered(first, chain([first], iterator))
        seen, kept = self.stats.seen - before.seen, self.stats.kept - before.kept
        if seen and not kept:
            raise self._watch.starved(f"all {seen:,} samples were dropped, {_reasons(self.stats, before)}")

    def keeps(self, images: Sequence[Any], captions: Sequence[Any]) -> list[bool]:
        """Whether each pair is kept, for ``datasets.Dataset.filter(..., batched=True, input_columns=[...])``.

        Args:
            images: As ``scorer.preprocess.pair`` takes them.
            captions: Likewise, one or several for each image.

        Raises:
            StarvationError: When nothing is kept any more.
        """
        pair = self._scorer.preprocess.pair
        pairs = enumerate(zip(images, captions, strict=True))
        samples = ({**pair(image, caption), "row": row} for row, (image, caption) in pairs)
        kept = {sample["row"] for group in self._kept_samples(self._grouped(samples)) for sample in group}
        return [row in kept for row in range(len(images))]

    def _filtered(self, first: Any, items: Iterator[Any]) -> Iterator[Any]:
        if self._columns is None and isinstance(first, list) and all(isinstance(item, Mapping) for item in first):
            return filter(None, self._kept_samples(items))
        if is_sample(self._named(first)):
            groups = self._grouped(map(self._named, items))
            return map(self._unnamed, chain.from_iterable(self._kept_samples(groups)))
        batches = self._kept(map(self._named, items))
        return (self._unnamed(batch) for batch in batches if len(batch["score"]))

    def _kept(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """What is kept of each batch, maybe nothing, and its scores."""
        for scored in score_columns(self._recheck, batches):
            keep, stats = scored.decide(self._threshold)
            self.stats += stats
            self._watch.add(scored.scores, seen=stats.seen, kept=stats.kept)
            yield {**take(scored.columns, scored.places[keep]), "score": torch.from_numpy(scored.scores[keep])}

    def _kept_samples(self, groups: Iterable[list[Mapping[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
        """What is kept of each list of samples, maybe nothing, with its scores."""
        for batch in self._kept(map(self._stacked, groups)):
            samples = zip(batch[_SAMPLES], batch["score"], strict=True)
            yield [{**_without_reason(sample), "score": score} for sample, score in samples]

    def _stacked(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch with what a filter needs of samples, and the samples."""
        return {
            "pixel_values": torch.stack([torch.as_tensor(sample["pixel_values"]) for sample in samples]),
            "input_ids": self._scorer.preprocess.tokenize.join(
                [torch.as_tensor(sample["input_ids"])[None] for sample in samples]
            ),
            "reason": [sample["reason"] for sample in samples],
            _SAMPLES: samples,
        }

    def _grouped(self, samples: Iterable[T]) -> Iterator[list[T]]:
        iterator = iter(samples)
        return iter(lambda: list(islice(iterator, self._batch_size)), [])

    def _named(self, item: Any) -> Mapping[str, Any]:
        """The columns of an item by name."""
        if self._columns is None and isinstance(item, Mapping):
            return item
        if self._columns is None or not isinstance(item, tuple | list):
            expected = "a dict" if self._columns is None else f"a tuple of {list(self._columns)}"
            hint = "; the names of a tuple's columns are given as `columns`" if self._columns is None else ""
            raise TypeError(f"a batch or sample is a {type(item).__name__}, and should be {expected}{hint}")
        if len(item) != len(self._columns):
            raise ValueError(f"a batch or sample has {len(item)} columns, but columns are {list(self._columns)}")
        return dict(zip(self._columns, item, strict=True))

    def _unnamed(self, columns: dict[str, Any]) -> Any:
        if self._columns is None:
            return columns
        return tuple(columns["score" if name == "reason" else name] for name in self._columns)


def _without_reason(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name != "reason"}


def _reasons(after: FilterStats, before: FilterStats) -> str:
    counts = {reason: number - before.dropped.get(reason, 0) for reason, number in after.dropped.items()}
    return ", ".join(f"{number:,} as {reason}" for reason, number in counts.items() if number)
