import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.kind import DEFAULT_THRESHOLD
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import DropReason, SampleRow

UNSCORED = [reason for reason in DropReason if reason not in (DropReason.BELOW_THRESHOLD, DropReason.NOT_IN_SUBSET)]


def table(scores: list[float | DropReason]) -> ShardScores:
    """Scores of a shard; a reason stands for a sample that has none."""
    rows = [
        SampleRow(str(index), index, score if isinstance(score, DropReason) else None)
        for index, score in enumerate(scores)
    ]
    cosines = np.array([score for score in scores if not isinstance(score, DropReason)], dtype=np.float32)
    metadata = ScoreMetadata(shard="", num_bytes=0, num_samples=len(rows), torn=False, fingerprint={})
    return ShardScores.from_rows(SampleRows.of(rows), cosines, metadata)


def is_kept(score: float | DropReason, threshold: float) -> bool:
    """The definition, in Python's own floats."""
    if isinstance(score, DropReason) or not math.isfinite(score):
        return False
    return max(0.0, min(1.0, float(np.float32(score)))) >= threshold


def reason_of(score: float | DropReason) -> DropReason | None:
    """Why there is no score."""
    if isinstance(score, DropReason):
        return score
    return None if math.isfinite(score) else DropReason.NOT_FINITE


any_float = st.floats(width=32) | st.floats(-1.5, 1.5, width=32)
thresholds = st.floats(-1, 1) | st.sampled_from([0.0, -0.0, 0.1, 0.25, 0.3, 1.0, -1.0])


@st.composite
def scores_near(draw, threshold: float) -> float:
    """A float32 at, just below or just above a threshold."""
    at = np.float32(threshold)
    return float(draw(st.sampled_from([at, np.nextafter(at, np.float32(-9)), np.nextafter(at, np.float32(9))])))


def check_selection(scores: list[float | DropReason], threshold: float) -> None:
    selection = select(table(scores), threshold)
    kept = [is_kept(score, threshold) for score in scores]
    assert selection.keep.tolist() == kept
    assert (selection.stats.seen, selection.stats.kept) == (len(scores), sum(kept))
    reasons = [
        reason_of(score) or DropReason.BELOW_THRESHOLD for score, keep in zip(scores, kept, strict=True) if not keep
    ]
    assert selection.stats.dropped == {reason: reasons.count(reason) for reason in DropReason if reason in reasons}


@settings(max_examples=400)
@given(st.data(), thresholds)
def test_a_pair_is_kept_when_its_clipped_score_reaches_the_threshold(data, threshold):
    kinds = any_float | scores_near(threshold) | st.sampled_from(UNSCORED)
    check_selection(data.draw(st.lists(kinds, max_size=12)), threshold)


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.25, 0.28, 0.3, 0.7, 1 / 3, 0.0, 1.0])
def test_a_score_on_the_threshold_and_one_step_beside_it_are_told_apart(threshold):
    """0.1 in float32 is more than 0.1, and 0.7 is less: in float32 both would be kept."""
    at = np.float32(threshold)
    steps = [np.nextafter(at, np.float32(-9)), at, np.nextafter(at, np.float32(9))]
    check_selection([float(step) for step in steps], threshold)


def test_the_default_threshold_keeps_a_score_of_a_quarter():
    assert DEFAULT_THRESHOLD == 0.25
    below = float(np.nextafter(np.float32(0.25), np.float32(0)))
    assert select(table([0.25, below]), DEFAULT_THRESHOLD).keep.tolist() == [True, False]


@pytest.mark.parametrize("threshold", [None, -1.0, 0.0, 0.5])
def test_a_score_that_is_no_finite_number_is_never_kept_and_counted_as_that(threshold):
    selection = select(table([math.nan, 0.6, math.inf, -math.inf]), threshold)
    assert selection.keep.tolist() == [False, True, False, False]
    assert selection.stats.dropped == {DropReason.NOT_FINITE: 3}


@pytest.mark.parametrize("threshold", [None, -1.0, 0.0, 0.25, 1.0])
def test_what_could_not_be_scored_is_dropped_for_its_reason_whatever_the_threshold(threshold):
    selection = select(table([*UNSCORED, 1.0, DropReason.TORN]), threshold)
    assert selection.stats.kept == 1
    assert selection.stats.dropped == {
        reason: 2 if reason is DropReason.TORN else 1 for reason in DropReason if reason in UNSCORED
    }


@settings(max_examples=100)
@given(st.lists(any_float | st.sampled_from(UNSCORED), max_size=12))
def test_without_a_threshold_all_that_could_be_scored_is_kept(scores):
    selection = select(table(scores), None)
    assert selection.keep.tolist() == [reason_of(score) is None for score in scores]
    assert DropReason.BELOW_THRESHOLD not in selection.stats.dropped


@settings(max_examples=100)
@given(st.lists(any_float | st.sampled_from(UNSCORED), max_size=12), thresholds, thresholds)
def test_a_higher_threshold_never_keeps_more(scores, one, other):
    low, high = sorted([one, other])
    assert not (select(table(scores), high).keep & ~select(table(scores), low).keep).any()


def test_a_shard_without_samples_keeps_nothing():
    selection = select(table([]), 0.25)
    assert selection.keep.shape == (0,)
    assert (selection.stats.seen, selection.stats.kept, selection.stats.dropped) == (0, 0, {})
