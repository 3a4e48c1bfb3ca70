"""The sample of rows is the same whatever the order of the shards, and fair."""

import numpy as np
import pytest

from clipfilter_wds.scores.rescore.row_sample import NOT_SAMPLED, RowSampler, row_hashes

SHARDS = {f"{number:05d}": np.flatnonzero(np.arange(40) % 7 != number % 7) for number in range(12)}


def sampled(size, names, seed=0) -> list[tuple[str, int]]:
    sampler = RowSampler(size, seed)
    for name in names:
        sampler.add(name, SHARDS[name])
    sample = sampler.finish()
    return [(names[shard], int(index)) for shard, index in zip(sample.shards, sample.indices, strict=True)]


@pytest.mark.parametrize("size", [1, 10, 100, 10_000])
def test_the_sample_is_of_the_smallest_hashes_in_their_order(size):
    rows = [(name, int(index)) for name in SHARDS for index in SHARDS[name]]
    hashes = {row: int(row_hashes(0, row[0], np.array([row[1]]))[0]) for row in rows}
    assert sampled(size, [*SHARDS]) == sorted(rows, key=hashes.get)[:size]


def test_the_order_of_the_shards_changes_nothing_and_the_seed_does():
    names = [*SHARDS]
    assert sampled(50, names[::-1]) == sampled(50, names)
    assert set(sampled(50, names, seed=1)) != set(sampled(50, names))


def test_rows_are_chosen_evenly():
    hashes = row_hashes(3, "00000", np.arange(100_000))
    assert len(np.unique(hashes)) == len(hashes)
    counts = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16)
    assert np.abs(counts - 100_000 / 16).max() < 5 * (100_000 / 16) ** 0.5


def test_each_row_is_told_its_place():
    sampler = RowSampler(30, 0)
    for name in SHARDS:
        sampler.add(name, SHARDS[name])
    sample = sampler.finish()
    found = {}
    for number in range(len(SHARDS)):
        places = sample.places_in(number, 40)
        found |= {int(place): (number, row) for row, place in enumerate(places) if place != NOT_SAMPLED}
    assert [found[place] for place in range(30)] == list(
        zip(sample.shards.tolist(), sample.indices.tolist(), strict=True)
    )
