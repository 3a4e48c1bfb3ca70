import numpy as np

from clipfilter_wds.report.shard_rates import ShardRate, outliers


def shards(rates: list[float], seen: int = 1000) -> list[ShardRate]:
    return [ShardRate(name=str(n), seen=seen, kept=round(rate * seen), torn=False) for n, rate in enumerate(rates)]


def test_a_shard_far_from_the_others_stands_out():
    rates = np.random.default_rng(0).normal(0.6, 0.02, 50).tolist()
    assert np.nonzero(outliers(shards([*rates, 0.3, 0.95])))[0].tolist() == [50, 51]


def test_what_chance_does_to_shards_of_their_size_is_no_outlier():
    rng = np.random.default_rng(1)
    sizes = rng.choice([10, 100, 10_000], 500)
    kept = rng.binomial(sizes, 0.4)
    drawn = [ShardRate(name="", seen=int(n), kept=int(k), torn=False) for n, k in zip(sizes, kept, strict=True)]
    assert sum(outliers(drawn)) <= 2


def test_equal_rates_leave_room_for_chance_only():
    assert outliers(shards([1.0] * 9 + [0.999])) == [False] * 10
    assert outliers(shards([1.0] * 9 + [0.9])) == [False] * 9 + [True]


def test_empty_shards_and_few_shards_never_stand_out():
    empty = ShardRate(name="", seen=0, kept=0, torn=True)
    assert outliers([*shards([0.5] * 5), empty]) == [False] * 6
    assert outliers(shards([0.1, 0.9, 0.9])) == [False] * 3
    assert outliers([]) == []
