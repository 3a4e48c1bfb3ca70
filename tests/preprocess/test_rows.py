import pickle

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from clipfilter_wds.preprocess.rows import SampleRows, code_of, count_reasons, reasons_of
from clipfilter_wds.types import DropReason, SampleRow

sizes = st.integers(0, 1 << 20)
rows = st.builds(
    SampleRow,
    key=st.text(),
    index=sizes,
    reason=st.none() | st.sampled_from(DropReason),
    num_tokens=sizes,
    truncated=st.booleans(),
    width=sizes,
    height=sizes,
    uid=st.none() | st.binary(min_size=16, max_size=16),
)


@given(st.lists(rows, max_size=8), st.lists(rows, max_size=8), st.data())
def test_columns_are_rows_joined_picked_and_sent_to_another_process(some, others, data):
    joined = SampleRows.concat([SampleRows.of(some), SampleRows.of([]), SampleRows.of(others)])
    assert list(joined) == [*some, *others]
    assert pickle.loads(pickle.dumps(joined)) == joined
    places = data.draw(st.lists(st.integers(0, len(joined) - 1))) if len(joined) else []
    assert list(joined.take(np.array(places, dtype=np.int64))) == [[*some, *others][place] for place in places]
    assert reasons_of(joined.reasons) == [row.reason for row in joined]
    assert joined.usable.tolist() == [row.reason is None for row in joined]
    assert joined.num_truncated == sum(row.truncated for row in joined)


@given(st.lists(st.none() | st.sampled_from(DropReason)))
def test_reasons_are_counted(reasons):
    counts = count_reasons(np.array([code_of(reason) for reason in reasons], dtype=np.int8))
    assert counts == {reason: reasons.count(reason) for reason in DropReason if reason in reasons}
