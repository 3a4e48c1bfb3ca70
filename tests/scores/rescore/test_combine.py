"""Combined scores equal their definitions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter_wds.scores.rescore.combine import Ranks, find_stages, min_rank, passes_stages, product, weighted_sum

FEW_VALUES = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5]), min_size=1, max_size=30)


@given(FEW_VALUES)
def test_a_rank_is_the_share_below_with_ties_averaged(values):
    scores = np.array(values, dtype=np.float32)
    places = {value: [] for value in scores.tolist()}
    for place, value in enumerate(sorted(scores.tolist())):
        places[value].append(place)
    expected = [np.mean(places[value]) / len(values) for value in scores.tolist()]
    for pieces in ([scores], np.array_split(scores, 3)):
        np.testing.assert_allclose(Ranks(pieces)(scores), expected, atol=1e-12)


def test_the_lowest_rank_counts():
    a, b = np.array([1, 2, 3, 4], dtype=np.float32), np.array([10, 30, 20, -5], dtype=np.float32)
    lowest = min_rank([a, b], [Ranks([a]), Ranks([b])])
    assert lowest.tolist() == [0.0, 0.25, 0.5, 0.0]
    assert lowest.dtype == np.float32


def test_sum_and_product():
    a, b = np.array([1, -2, 0.5], dtype=np.float32), np.array([3, 4, 1e30], dtype=np.float32)
    assert weighted_sum([a, b], [1, 0.5]).tolist() == [2.5, 0.0, np.float32(5e29)]
    assert product([a, b]).tolist() == [3.0, -8.0, np.float32(5e29)]


@settings(max_examples=25)
@given(st.lists(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3]), st.floats(-1, 1, width=32)), max_size=12)))
def test_stages_leave_the_best_of_all_by_each_score_in_turn(shards):
    """Equal scores are told apart by shard and index."""
    columns = [np.array(shard, dtype=np.float32).reshape(-1, 2).T for shard in shards]
    rows = [(number, index) for number, shard in enumerate(shards) for index in range(len(shard))]
    left = rows
    for stage, fraction in enumerate((0.6, 0.25)):
        best = sorted(left, key=lambda row: -columns[row[0]][stage][row[1]])[: round(fraction * len(rows))]
        left = [row for row in left if row in best]
    stages = find_stages(lambda: iter(columns), (0.6, 0.25))
    kept = [passes_stages(scores, cutoffs) for scores, cutoffs in zip(columns, stages, strict=True)]
    assert [(number, index) for number, each in enumerate(kept) for index in np.flatnonzero(each)] == left
