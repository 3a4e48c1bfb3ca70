import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from clipfilter_wds.preprocess.rows import code_of, reasons_of
from clipfilter_wds.scores.finite import finite_scores
from clipfilter_wds.types import DropReason


def codes_of(reasons):
    return np.array([code_of(reason) for reason in reasons], dtype=np.int8)


reason_lists = st.lists(st.sampled_from([None, None, *DropReason]))


@given(st.data(), reason_lists)
def test_every_sample_has_a_finite_score_or_a_reason(data, reasons):
    usable = [place for place, reason in enumerate(reasons) if reason is None]
    cosines = data.draw(hnp.arrays(np.float32, len(usable)))
    scores, codes = finite_scores(codes_of(reasons), cosines)
    checked = reasons_of(codes)
    assert scores.dtype == np.float32
    assert len(scores) == len(checked) == len(reasons)
    assert np.isfinite(scores).all()
    for place, reason in enumerate(reasons):
        cosine = cosines[usable.index(place)] if reason is None else None
        if cosine is not None and np.isfinite(cosine):
            assert (scores[place], checked[place]) == (cosine, None)
        else:
            assert (scores[place], checked[place]) == (0.0, reason or DropReason.NOT_FINITE)


def test_a_wrong_number_of_scores_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="2 samples could be scored, and there are 1 scores"):
        finite_scores(codes_of([None, DropReason.TORN, None]), np.zeros(1, dtype=np.float32))
