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
