import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfilter_wds.report.picks import FirstOfEach, Pick, Picker
from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.types import NO_REASON


def pick(tables: list[np.ndarray], threshold: float, num_picks: int) -> list[Pick]:
    picker = Picker(threshold, num_picks)
    for number, scores in enumerate(tables):
        picker.add(number, scores, usable=np.ones(len(scores), dtype=bool))
    return picker.finish()


def brute_force(tables: list[np.ndarray], threshold: float, size: int) -> set[Pick]:
    """The samples that must be there: both ends and both sides of the threshold, the earlier of equals first."""
    rows = [
        Pick(float(score), table, index) for table, scores in enumerate(tables) for index, score in enumerate(scores)
    ]
    below = [row for row in rows if not COSINES.passes(np.array([row.score]), threshold)[0]]
    above = [row for row in rows if COSINES.passes(np.array([row.score]), threshold)[0]]
    by_score, by_score_down = (sorted(rows, key=lambda row, sign=sign: sign * row.score) for sign in (1, -1))
    nearest_below = sorted(below, key=lambda row: -row.score)
    nearest_above = sorted(above, key=lambda row: row.score)
    return {row for chosen in (by_score, by_score_down, nearest_below, nearest_above) for row in chosen[:size]}


# Few values, so that there are many ties.
TABLES = st.lists(
    st.lists(st.sampled_from([-0.2, 0.0, 0.1, 0.125, 0.25, 0.3, 0.5]), max_size=30).map(
        lambda row: np.array(row, np.float32)
    ),
    max_size=5,
)


@given(TABLES, st.sampled_from([-0.5, 0.0, 0.125, 0.25, 0.9]), st.sampled_from([5, 20]))
def test_both_ends_and_both_sides_of_the_threshold_are_picked(tables, threshold, num_picks):
    picks = pick(tables, threshold, num_picks)
    assert brute_force(tables, threshold, num_picks // 5) <= set(picks)
    assert len(picks) == len(set(picks)) <= num_picks
    assert picks == sorted(picks)


def test_the_rest_is_spread_over_the_scores():
    picks = pick([np.linspace(-0.3, 0.5, 10_000, dtype=np.float32)], 0.25, 100)
    assert len(picks) == 100
    gaps = np.diff([row.score for row in picks])
    assert gaps.max() < 0.06


def test_samples_with_one_score_are_as_many_as_asked_for():
    assert len(pick([np.full(60, 0.3, np.float32), np.full(60, 0.2, np.float32)], 0.25, 100)) == 100


def test_what_could_not_be_scored_is_not_picked():
    picker = Picker(0.25, 10)
    scores = np.array([0.0, 0.3, np.nan, 0.2], dtype=np.float32)
    picker.add(0, scores, usable=np.array([False, True, True, True]))
    assert [(row.table, row.index) for row in picker.finish()] == [(0, 3), (0, 1)]


@pytest.mark.parametrize("num_picks", [0, 3])
def test_no_more_are_picked_than_asked_for(num_picks):
    assert len(pick([np.linspace(0, 1, 50, dtype=np.float32)] * 3, 0.25, num_picks)) == num_picks


@given(st.lists(st.lists(st.integers(NO_REASON, 4), max_size=20), max_size=5), st.integers(0, 4))
def test_the_first_samples_of_each_reason_are_picked(tables, size):
    chosen = FirstOfEach(size)
    for number, reasons in enumerate(tables):
        chosen.add(number, np.array(reasons, dtype=np.int8))
    rows = [(reason, table, index) for table, reasons in enumerate(tables) for index, reason in enumerate(reasons)]
    expected = {row for wanted in range(5) for row in [row for row in rows if row[0] == wanted][:size]}
    assert {(tables[pick.table][pick.index], pick.table, pick.index) for pick in chosen.picks} == expected
    assert len(chosen.picks) == len(expected)
