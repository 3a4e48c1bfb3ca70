import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from clipfilter_wds.scores.spread import Spread

cosines = st.floats(-1.0, 1.0, width=32)


@given(st.lists(arrays(np.float32, st.integers(0, 20), elements=cosines), max_size=4), st.integers(-100, 100))
def test_what_a_threshold_keeps_is_what_the_decision_keeps(shards, percent):
    scores, threshold = np.concatenate([np.zeros(0, np.float32), *shards]), percent / 100
    keep = np.clip(scores.astype(np.float64), 0, 1) >= threshold
    assert Spread(shards).kept(threshold) == pytest.approx(keep.sum() / max(len(scores), 1))


def test_quantiles_and_thresholds_are_named_in_two_lines():
    spread = Spread([np.linspace(0.1, 0.2, 500, dtype=np.float32), np.linspace(0.2, 0.3, 500, dtype=np.float32)])
    assert list(spread.describe()) == [
        "scores: 10% below 0.120, 50% below 0.200, 90% below 0.280",
        "thresholds: 0.16 keeps 70.0%, 0.20 keeps 50.1%, 0.24 keeps 30.0%, 0.28 keeps 10.0%",
    ]
    assert list(Spread([]).describe()) == []


def test_negative_cosines_are_said_to_count_as_0_where_the_threshold_0_keeps_them():
    spread = Spread([np.linspace(-0.5, -0.1, 50, dtype=np.float32), np.linspace(0.1, 0.3, 50, dtype=np.float32)])
    quantiles, thresholds = spread.describe()
    assert quantiles.startswith("scores: 10% below -0.4")
    assert thresholds.startswith("thresholds: 0.00 keeps 100.0% (a score below 0 counts as 0), 0.")
    [_, thresholds] = Spread([np.linspace(0.0, 0.001, 50, dtype=np.float32)]).describe()
    assert thresholds == "thresholds: 0.00 keeps 100.0%"
