import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipfilter_wds.report.histogram import STEPS, ScoreCounts
from clipfilter_wds.scores.kind import COSINES

# As a run finds them, and those that comparisons go wrong at: multiples of a step, and their neighbours.
ON_A_STEP = st.integers(-STEPS, STEPS).map(lambda step: np.float32(step / STEPS))
NEXT_TO_A_STEP = ON_A_STEP.flatmap(
    lambda score: st.sampled_from([np.nextafter(score, np.float32(end)) for end in (-2, 2)])
)
SCORES = st.one_of(ON_A_STEP, NEXT_TO_A_STEP, st.floats(-1, 1, width=32), st.just(np.float32("nan")))


@given(st.lists(hnp.arrays(np.float32, st.integers(0, 20), elements=SCORES), max_size=4))
def test_counts_equal_the_decisions_at_every_step(tables):
    counts = ScoreCounts()
    for scores in tables:
        counts.add(scores)
    everything = np.concatenate([np.empty(0, np.float32), *tables])
    steps = {
        1,
        2500,
        STEPS,
        *(int(abs(score) * STEPS) + more for score in everything[~np.isnan(everything)] for more in (0, 1)),
    }
    at_least = counts.at_least(-STEPS, STEPS)
    for step in steps & set(range(1, STEPS + 1)):
        assert at_least[step + STEPS] == COSINES.passes(everything, step / STEPS).sum()
    assert at_least[0] == counts.total == (~np.isnan(everything)).sum()


def test_a_part_of_the_counts_is_that_part():
    counts = ScoreCounts()
    counts.add(np.linspace(-0.5, 0.5, 1001, dtype=np.float32))
    assert counts.at_least(-10, 2000) == counts.at_least(-STEPS, STEPS)[STEPS - 10 : STEPS + 2001]
    assert (counts.lowest, counts.highest) == (-0.5, 0.5)
