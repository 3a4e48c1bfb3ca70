"""Near-duplicates are those of the greedy definition, and planted ones are found."""

import time

import numpy as np
import pytest
import torch

from clipfilter_wds.scores.rescore.near_duplicates import near_duplicates
from tests.support.embeddings import unit_rows

CPU = torch.device("cpu")
SEARCHES = ["exact", "clustered"]


def definition(embeddings, similarity) -> np.ndarray:
    rows = embeddings.astype(np.float64)
    kept: list[int] = []
    for row in range(len(rows)):
        if not any(cosine(rows[row], rows[other]) >= similarity for other in kept):
            kept.append(row)
    return ~np.isin(np.arange(len(rows)), kept)


def cosine(one, other) -> float:
    return one @ other / np.sqrt((one @ one) * (other @ other))


def with_copies(rng, num_rows, dim, *, share=0.3, noise=0.2, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows and noisy copies of some, in a random order; and which scene each shows."""
    distinct = unit_rows(rng, num_rows - int(share * num_rows), dim, centres=unit_rows(rng, 30, dim))
    scenes = np.concatenate([np.arange(len(distinct)), rng.integers(0, len(distinct), int(share * num_rows))])
    rows = distinct[scenes] + noise * unit_rows(rng, num_rows, dim)
    order = rng.permutation(num_rows)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)[order], scenes[order]


def found(embeddings, similarity, search) -> np.ndarray:
    return near_duplicates(embeddings.copy(), similarity, search=search, device=CPU)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.95, 1.0])
def test_the_exact_search_is_the_greedy_definition(similarity, dtype, monkeypatch):
    monkeypatch.setattr("clipfilter_wds.scores.rescore.blocks._CPU_BLOCK", (64, 50))
    embeddings, _ = with_copies(np.random.default_rng(0), 500, 16, dtype=dtype)
    np.testing.assert_array_equal(found(embeddings, similarity, "exact"), definition(embeddings, similarity))


def test_a_limit_that_lies_on_similarities_is_decided_in_float64():
    """Products that differ only beyond float32 lie on both sides of the limit."""
    rows = np.zeros((3, 64), dtype=np.float32)
    rows[:, 0] = 1.0, 0.95, np.nextafter(np.float32(0.95), np.float32(1))
    rows[1:, 1] = np.sqrt(1 - 0.95**2)
    below, above = (cosine(rows[0].astype(np.float64), row.astype(np.float64)) for row in rows[1:])
    assert 0 < above - below < 1e-8
    middle = (below + above) / 2
    for row, limit, is_near in [
        (1, below, True),
        (1, middle, False),
        (2, middle, True),
        (2, above, True),
        (2, 1.0, False),
    ]:
        assert found(rows[[0, row]], limit, "exact").tolist() == [False, is_near]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("search", SEARCHES)
def test_equal_embeddings_are_near_at_any_limit_though_rounding_made_them_longer_or_shorter(search, dtype):
    rows = unit_rows(np.random.default_rng(0), 500, 512, dtype=dtype)
    assert found(np.concatenate([rows, rows]), 1.0, search).tolist() == [False] * 500 + [True] * 500


@pytest.mark.parametrize("search", SEARCHES)
def test_there_are_no_chains(search):
    """B is near to A and dropped; C is near to B alone, and kept."""
    angles = np.deg2rad([0, 15, 30])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert found(embeddings, 0.95, search).tolist() == [False, True, False]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("similarity", [0.95, 1.0])
def test_of_many_equal_rows_the_first_is_kept(search, similarity):
    one = np.eye(16, dtype=np.float16)[:1]  # of length 1 exactly
    assert found(np.tile(one, (3000, 1)), similarity, search).tolist() == [False] + [True] * 2999


@pytest.mark.parametrize("search", SEARCHES)
def test_no_rows_are_no_duplicates(search):
    assert found(np.zeros((0, 8), dtype=np.float16), 0.95, search).tolist() == []


def test_clusters_of_few_rows_are_made_without_a_warning(capfd):
    found(unit_rows(np.random.default_rng(0), 100, 32), 0.95, "clustered")
    assert capfd.readouterr() == ("", "")


def test_clusters_find_nearly_all():
    embeddings, _ = with_copies(np.random.default_rng(0), 6000, 32)
    exact, clustered = (found(embeddings, 0.95, search) for search in SEARCHES)
    assert (exact & clustered).sum() > 0.99 * exact.sum()


@pytest.mark.slow
def test_copies_are_found_among_a_hundred_thousand_rows(capsys):
    embeddings, scenes = with_copies(np.random.default_rng(0), 100_000, 64, dtype=np.float16)
    _, first = np.unique(scenes, return_index=True)
    is_copy = ~np.isin(np.arange(len(scenes)), first)
    for search in SEARCHES:
        began = time.perf_counter()
        dropped = found(embeddings, 0.95, search)
        seconds = time.perf_counter() - began
        recall, precision = dropped[is_copy].mean(), is_copy[dropped].mean()
        with capsys.disabled():
            print(f"\n{search}: recall {recall:.4f}, precision {precision:.4f}, {seconds:.1f} s")
        assert recall > 0.99
        assert precision > 0.99
