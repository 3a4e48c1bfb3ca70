import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from clipfilter_wds.scores.kind import COSINES, DEFAULT_THRESHOLD, ScoreKind
from clipfilter_wds.scores.selection import Choice, select
from clipfilter_wds.types import DropReason, SampleRow
from tests.support.score_tables import FINGERPRINT, shard_scores

LOSSES = ScoreKind("neg_clip_loss", None, 0.0)


@given(st.floats(-1, 1))
def test_any_cosine_is_a_threshold(threshold):
    assert COSINES.check_threshold(threshold) == threshold


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (1.4, "threshold is 1.4; a cosine lies in [-1, 1]. Did you mean 0.14?"),
        (2.5, "threshold is 2.5; a cosine lies in [-1, 1]. Did you mean 0.25?"),
        (25, "threshold is 25; a cosine lies in [-1, 1]. Did you mean 0.25?"),
        (28.5, "threshold is 28.5; a cosine lies in [-1, 1]. Did you mean 0.285?"),
        (100, "threshold is 100; a cosine lies in [-1, 1]. Did you mean 1?"),
        (250, "threshold is 250; a cosine lies in [-1, 1]."),
        (-1.5, "threshold is -1.5; a cosine lies in [-1, 1]."),
        (math.nan, "threshold is nan; a cosine lies in [-1, 1]."),
        (math.inf, "threshold is inf; a cosine lies in [-1, 1]."),
        (-math.inf, "threshold is -inf; a cosine lies in [-1, 1]."),
    ],
)
def test_a_threshold_that_no_cosine_can_reach_is_refused_with_a_hint(threshold, message):
    with pytest.raises(ValueError, match="threshold") as error:
        COSINES.check_threshold(threshold)
    assert str(error.value) == message


@given(st.floats().filter(lambda threshold: not -1 <= threshold <= 1))
def test_every_other_number_is_refused(threshold):
    with pytest.raises(ValueError, match="a cosine lies in"):
        COSINES.check_threshold(threshold)


@given(st.lists(st.floats(width=32)), st.floats(-5, 0))
def test_scores_of_another_kind_are_compared_as_they_are(scores, threshold):
    kept = [float(np.float32(score)) >= threshold for score in scores]
    assert LOSSES.passes(np.array(scores, dtype=np.float32), threshold).tolist() == kept


def test_the_threshold_of_another_kind_lies_in_its_range():
    assert LOSSES.check_threshold(-3.5) == -3.5
    assert ScoreKind("norm_sim", 0.0, None).check_threshold(7.5) == 7.5
    with pytest.raises(ValueError, match=r"threshold is 0.25; a score of kind 'neg_clip_loss' lies in \[-inf, 0\]"):
        Choice(threshold=0.25, kind=LOSSES)
    with pytest.raises(ValueError, match="threshold is nan"):
        ScoreKind("norm_sim", None, None).check_threshold(math.nan)


def test_only_cosines_have_a_default_threshold():
    assert COSINES.resolve_threshold("auto") == DEFAULT_THRESHOLD
    assert LOSSES.resolve_threshold(-0.5) == -0.5
    assert LOSSES.resolve_threshold(None) is None
    for kind in (LOSSES, ScoreKind("sum", None, None)):  # 0.25 lies in the range of a sum, and means nothing there
        with pytest.raises(ValueError, match=f"'{kind.name}', which has no usual threshold; give a threshold that"):
            kind.resolve_threshold("auto")
    with pytest.raises(ValueError, match="threshold is 'high'; give a number, 'auto', or None"):
        COSINES.resolve_threshold("high")


def test_a_table_is_selected_from_by_the_kind_that_it_names():
    rows = [SampleRow(str(index), index) for index in range(4)]
    fingerprint = {**FINGERPRINT, "score": LOSSES.name}
    scores = shard_scores(rows, [-2.0, -0.5, -0.25, 0.0], fingerprint=fingerprint, range=(None, 0.0))
    assert scores.metadata.kind == LOSSES
    selection = select(scores, -0.5)
    assert selection.keep.tolist() == [False, True, True, True]
    assert selection.stats.dropped == {DropReason.BELOW_THRESHOLD: 1}
    assert select(shard_scores(rows, [-2.0, -0.5, -0.25, 0.0]), -0.5).keep.all()
