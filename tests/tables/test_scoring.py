from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.tables.scoring import Pair, PairScores, batched, score_pairs
from clipfilter_wds.tables.tally import PairTally
from clipfilter_wds.types import DropReason, SampleRow
from tests.support.toys import encoded, photo


def scores_of(similarity: list[float], reasons: list[DropReason | None] | None = None) -> PairScores:
    reasons = reasons or [None] * len(similarity)
    return PairScores(similarity=np.array(similarity, dtype=np.float32), reasons=reasons, num_truncated=0)


@given(st.lists(st.floats(-1, 1, width=32)), st.floats(-1, 1))
def test_rows_are_decided_as_samples_of_shards_are(cosines, threshold):
    rows = SampleRows.of(SampleRow(str(index), index) for index in range(len(cosines)))
    metadata = ScoreMetadata(shard="", num_bytes=0, num_samples=len(rows), torn=False, fingerprint={})
    table = ShardScores.from_rows(rows, np.array(cosines, dtype=np.float32), metadata)
    found = scores_of(list(np.clip(cosines, 0.0, 1.0))).keep(threshold)
    assert found.tolist() == select(table, threshold).keep.tolist()


def test_the_threshold_is_not_rounded_to_the_scores_precision():
    below, above = np.float32(0.7), np.nextafter(np.float32(0.7), np.float32(1))
    assert float(below) < 0.7 < float(above)
    assert scores_of([below, above]).keep(0.7).tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_back_in_order_with_what_went_along(scorer, tmp_path, num_workers):
    for seed in range(30):
        (tmp_path / f"{seed}.jpg").write_bytes(encoded(photo(seed, (300, 300) if seed < 5 else (20, 20))))
    pairs = [Pair(f"{seed}.jpg", f"photo number {seed}") for seed in range(30)]
    alone = [score_of(pair, scorer, tmp_path) for pair in pairs]
    batches = enumerate(batched(pairs, 4))
    found = list(score_pairs(batches, Recheck(scorer, 0.25), folder=tmp_path, num_workers=num_workers))
    assert [companion for companion, _ in found] == list(range(8))
    assert np.abs(np.concatenate([scores.similarity for _, scores in found]) - alone).max() < 1e-5


def score_of(pair: Pair, scorer, folder: Path) -> float:
    ((_, scores),) = score_pairs([(None, [pair])], Recheck(scorer, 0.25), folder=folder, num_workers=0)
    return scores.similarity[0]


def test_batches_are_drawn_only_a_few_ahead(scorer, tmp_path):
    drawn = []

    def batches():
        for number in range(1000):
            drawn.append(number)
            yield number, [Pair(None, None)] * 3

    scored = score_pairs(batches(), Recheck(scorer, 0.25), folder=tmp_path, num_workers=2)
    for _ in range(5):
        next(scored)
    assert len(drawn) < 20
    scored.close()


def test_the_accounting_closes_whatever_is_kept():
    tally = PairTally()
    pairs = [Pair("a", "b"), Pair(None, "b"), Pair("c", None), Pair("d", "b")]
    reasons = [None, DropReason.MISSING_IMAGE, DropReason.BLANK_CAPTION, None]
    tally.add(pairs, scores_of([0.5, 0.0, 0.0, 0.1], reasons), np.array([True, False, True, False]))
    tally.add(pairs[:1], scores_of([0.5]), np.array([True]))
    assert (tally.counts.seen, tally.counts.kept) == (5, 3)
    assert tally.counts.dropped == {DropReason.BELOW_THRESHOLD: 1, DropReason.MISSING_IMAGE: 1}
    assert tally.unusable == {DropReason.MISSING_IMAGE: 1, DropReason.BLANK_CAPTION: 1}
    assert tally.first == {DropReason.MISSING_IMAGE: (1, None), DropReason.BLANK_CAPTION: (2, "c")}
