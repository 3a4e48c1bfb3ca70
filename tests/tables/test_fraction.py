"""A fraction of a table's rows: those with the highest scores, exactly so many."""

import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from clipfilter_wds.tables.fraction import ScoredTable
from clipfilter_wds.tables.scoring import PairScores
from clipfilter_wds.types import DropReason
from tests.support.pair_tables import NUM_ROWS, SUFFIXES, read_records


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("fraction", [0.0, 0.37, 1.0])
def test_the_rows_with_the_highest_scores_are_kept_as_they_are(
    command, folder, clip_folder, expected, tmp_path, suffix, fraction
):
    out = tmp_path / f"kept.{suffix}"
    options = ("--keep_fraction", fraction, "--model", clip_folder, "--device", "cpu", "--precision", "fp32")
    code, shown = command("table", folder / f"pairs.{suffix}", "--output", out, *options, "--batch_size", 7)
    assert code == 0
    num_scored = NUM_ROWS - 2  # rows 3 and 4 have no score
    num_kept = round(fraction * num_scored)
    ranked = sorted(set(range(NUM_ROWS)) - {3, 4}, key=lambda row: (-expected[row], row))
    rows = read_records(folder / f"pairs.{suffix}")
    assert read_records(out) == [rows[row] for row in sorted(ranked[:num_kept])]
    assert re.search(rf"seen +{NUM_ROWS}\b", shown)
    assert re.search(rf"kept +{num_kept}\b", shown)
    assert re.search(r"dropped: unreadable_image +1\b", shown)
    assert f"({num_kept} of {num_scored} scores, keep_fraction {fraction:g})" in shown
    if num_kept:
        lowest = float(re.search(r"cut: scores of at least ([\d.e-]+) are kept", shown)[1])
        assert lowest == pytest.approx(expected[ranked[num_kept - 1]], abs=1e-5)
    else:
        assert "cut: no score is kept" in shown


def test_it_can_be_written_as_another_type_with_its_scores(command, folder, clip_folder, tmp_path):
    options = ("--keep_fraction", 0.2, "--model", clip_folder, "--device", "cpu", "--score_key", "s")
    assert command("table", folder / "pairs.csv", "--output", tmp_path / "kept.parquet", *options)[0] == 0
    assert len(read_records(tmp_path / "kept.parquet")) == round(0.2 * (NUM_ROWS - 2))


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]), st.none() | st.sampled_from(DropReason))),
    st.floats(0, 1),
)
def test_of_equal_scores_those_of_the_first_rows_are_kept(rows, fraction):
    table = ScoredTable()
    for start in range(0, len(rows), 3):
        similarity, reasons = zip(*rows[start : start + 3], strict=True)
        table.add(PairScores(similarity=np.array(similarity, np.float32), reasons=reasons, num_truncated=1))
    decided = table.decide(fraction)
    scored = [row for row, (_, reason) in enumerate(rows) if reason is None]
    best = sorted(scored, key=lambda row: (-rows[row][0], row))[: round(fraction * len(scored))]
    assert np.flatnonzero(decided.keep).tolist() == sorted(best)
    scores, keep = decided.between(1, 4)
    assert list(scores.reasons) == [reason for _, reason in rows[1:4]]
    assert len(keep) == len(rows[1:4])
