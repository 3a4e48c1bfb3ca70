import subprocess
import sys
import textwrap

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from clipfilter_wds.scores.fraction import check_fraction, find_cutoffs


def kept_by_sorting(shards: list[np.ndarray], fraction: float) -> list[list[bool]]:
    """The definition: sort everything by score, then shard, then index, and take the first."""
    places = [
        (-float(score), shard, index)
        for shard, scores in enumerate(shards)
        for index, score in enumerate(scores)
        if not np.isnan(score)
    ]
    kept = {(shard, index) for _, shard, index in sorted(places)[: round(fraction * len(places))]}
    return [[(shard, index) in kept for index in range(len(scores))] for shard, scores in enumerate(shards)]


def kept(shards: list[np.ndarray], fraction: float) -> list[list[bool]]:
    cutoffs = find_cutoffs(lambda: iter(shards), fraction)
    return [cutoff.keeps(scores).tolist() for cutoff, scores in zip(cutoffs, shards, strict=True)]


few_values = st.sampled_from([0.25, 0.3, -0.0, 0.0, float("nan"), -0.1, 1.0, float(np.nextafter(np.float32(0.3), 1))])
any_value = st.floats(width=32, allow_nan=True, allow_infinity=True)
shard = st.lists(few_values | any_value, max_size=12).map(lambda scores: np.array(scores, dtype=np.float32))
fractions = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 0.3, 1e-9])


@settings(max_examples=500)
@given(st.lists(shard, max_size=6), fractions)
@example([], 1.0)
@example([np.array([], dtype=np.float32)], 0.5)
@example([np.array([0.0, -0.0, 0.0], dtype=np.float32)], 0.5)
@example([np.array([np.nan], dtype=np.float32)], 1.0)
def test_keeps_what_sorting_by_score_shard_and_index_would_keep(shards, fraction):
    assert kept(shards, fraction) == kept_by_sorting(shards, fraction)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.5, 0.9, 1.0])
def test_a_million_scores_with_many_ties_are_cut_as_a_sort_cuts_them(fraction):
    rng = np.random.default_rng(0)
    scores = rng.normal(0.25, 0.05, 1_000_000).astype(np.float32)
    scores[::2] = np.round(scores[::2], 2)  # half of them are a few dozen values
    scores[::7] = np.float32(0.25)
    scores[::31] = np.nan
    shards = np.array_split(scores, 97)
    usable = np.flatnonzero(~np.isnan(scores))
    order = usable[np.argsort(-scores[usable], kind="stable")]
    expected = np.zeros(len(scores), dtype=bool)
    expected[order[: round(fraction * len(usable))]] = True
    cutoffs = find_cutoffs(lambda: iter(shards), fraction)
    found = np.concatenate([cutoff.keeps(part) for cutoff, part in zip(cutoffs, shards, strict=True)])
    assert np.array_equal(found, expected)
    assert not found[np.isnan(scores)].any()


@settings(max_examples=100)
@given(st.lists(shard, min_size=1, max_size=5), fractions, fractions)
def test_a_larger_fraction_keeps_all_that_a_smaller_one_keeps(shards, one, other):
    less, more = (np.concatenate(kept(shards, fraction)) for fraction in sorted([one, other]))
    assert not (np.asarray(less, dtype=bool) & ~np.asarray(more, dtype=bool)).any()


def test_memory_does_not_grow_with_the_number_of_scores():
    """In a process of its own: 10^6 scores and 10^7, in shards of 10,000, are cut in the same memory."""
    code = """
        import resource, sys
        import numpy as np
        from clipfilter_wds.scores.fraction import find_cutoffs
        peaks = []
        for num_shards in (100, 1000):
            def read():
                for shard in range(num_shards):
                    yield np.random.default_rng(shard).normal(0.25, 0.05, 10_000).astype(np.float32)
            assert len(find_cutoffs(read, 0.3)) == num_shards
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        print(*peaks)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    small, large = map(int, out.stdout.split())
    assert large - small < 2_000_000  # 10^7 float32 would be 40 MB


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (30, "keep_fraction is 30; a fraction lies in [0, 1]. Did you mean 0.3?"),
        (-0.1, "keep_fraction is -0.1; a fraction lies in [0, 1]."),
        (float("nan"), "keep_fraction is nan; a fraction lies in [0, 1]."),
    ],
)
def test_what_is_no_fraction_is_refused_with_a_hint(fraction, message):
    with pytest.raises(ValueError, match="keep_fraction") as error:
        check_fraction(fraction)
    assert str(error.value) == message
