import pickle

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from clipfilter_wds.scores.selection import Choice, select
from clipfilter_wds.scores.where import Where
from clipfilter_wds.types import DropReason, SampleRow, ShardError
from tests.support.score_tables import shard_scores

TABLE = pa.table(
    {
        "key": ["a", "b", "c", "d"],
        "width": pa.array([100, 200, None, 2**31 - 1], pa.int32()),
        "height": pa.array([100, 50, 10, 2**31 - 1], pa.int32()),
        "id": pa.array([0, 2**24 + 1, 2**40 + 1, 2**60 + 1], pa.int64()),
        "score": pa.array([0.1, 0.25, 0.5, 0.7], pa.float32()),
        "truncated": [True, False, True, False],
        "meta.lang": ["en", None, "de", "en"],
    }
)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("width >= 200", "bd"),
        ("width >= 200 and height < 100", "b"),
        ("width >= 200 or height < 50", "bcd"),
        ("not (width >= 200)", "a"),
        ("not truncated", "bd"),
        ("truncated", "ac"),
        ("100 < width <= 200", "b"),
        ("width is None", "c"),
        ("width is not None", "abd"),
        ("key in ['a', 'd', 'z']", "ad"),
        ("key not in ('a', 'd')", "bc"),
        ("width not in [100]", "bd"),
        ("meta.lang == 'en'", "ad"),
        ("meta.lang != 'en'", "c"),
        ("width / height > 1.5", "b"),
        ("width * height > 1e18", "d"),
        ("-width < -150", "bd"),
        ("width + 1 == 101 or key == 'c'", "ac"),
        ("score > 0.1", "abcd"),  # 0.1 in float32 is more than 0.1
        ("score >= 0.7", ""),  # and 0.7 is less
        ("width > 1.5e2", "bd"),
        ("id > 1e18", "d"),
        ("id >= 0.5", "bcd"),
        ("0.5 > id", "a"),
        ("id > score", "bcd"),
        ("id - 1 == 16777216", "b"),
        ("id in [16777217.0, 0.5]", "b"),
        ("id == 16777217", "b"),
        ("-id < -0.5", "bcd"),
        ("True", "abcd"),
        ("  width >= 200  ", "bd"),
    ],
)
def test_what_meets_a_condition_is_selected(text, chosen):
    where = pickle.loads(pickle.dumps(Where(text)))
    assert "".join(np.array(["a", "b", "c", "d"])[where.selects(TABLE)]) == chosen


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "f(width)", "width.bit_length()", "[w for w in width]", "width if 1 else 2",
        "lambda: 1", "width := 3", "width[0]", "f'{width}'", "width ** 9", "width @ 2", "width // 2", "width & 3",
        "~width", "*width", "", "width >", "import os", "a; b", "width = 3", "{'a': 1}", "yield", "\x00",
    ],
)  # fmt: skip
def test_nothing_else_is_taken(text):
    with pytest.raises(ValueError, match=r"can't use|is no condition"):
        Where(text)


def test_what_is_no_condition_is_no_line_of_a_file():
    with pytest.raises(ValueError, match=r"where 'width >' is no condition: invalid syntax; use columns"):
        Where("width >")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("width % 2 == 0", "width % 2"), ("~width", "~width"), ("f(width) > 1", r"f\(width\)"), ("a[0]", r"a\[0\]")],
)
def test_what_can_not_be_used_is_shown(text, shown):
    with pytest.raises(ValueError, match=f"can't use '{shown}'; use columns"):
        Where(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wdith > 1", r"there is no column 'wdith'; the tables have key, width, height, id, score, truncated"),
        ("width", "does not go with the types of the columns"),
        ("key > 3", "does not go with the types of the columns"),
        ("key + 1 > 3", "key holds string, which is no number"),
        ("width in ['a']", "does not go with the types of the columns"),
        ("width in height", "can't use 'height' there"),
        ("width in [height]", r"can't use '\[height\]' there"),
        ("width is 3", "can't use '3' there"),
        ("[1, 2]", r"can't use '\[1, 2\]' there"),
        ("width == None", "nothing equals None; `width is None` finds what is missing"),
        ("None != width", "nothing equals None; `width is None`"),
        ("key in ['a', None]", "nothing equals None; `key is None` finds"),
        (f"width > {10**30}", "does not go with the types of the columns: .*too large"),
        ("not " * 1500 + "truncated", r"where '(not )+…' is nested too deeply"),
        ("truncated and 1", "does not go with the types of the columns"),
    ],
)
def test_what_the_tables_can_not_answer_is_refused_before_there_are_rows(text, message):
    with pytest.raises(ValueError, match=message):
        Where(text).check(TABLE.schema)


@given(st.lists(st.none() | st.integers(-5, 5)), st.integers(-5, 5), st.integers(-5, 5))
def test_comparisons_are_pythons_and_never_hold_for_what_is_missing(values, low, high):
    table = pa.table({"n": pa.array(values, pa.int32())})
    for text in (f"{low} <= n < {high}", f"n > {low} or n == {high}", f"not n > {low}", f"n not in [{low}, {high}]"):
        expected = [value is not None and eval(text, {"n": value}) for value in values]
        assert Where(text).selects(table).tolist() == expected


def test_a_fraction_is_of_what_is_selected_and_the_others_have_a_reason():
    rows = [SampleRow(str(i), i, DropReason.TORN if i == 3 else None, width=100 * i) for i in range(6)]
    scores = shard_scores(rows, [0.9, 0.1, 0.2, 0.3, 0.4])
    choice = Choice(keep_fraction=0.5, where=Where("width >= 100"))
    np.testing.assert_array_equal(choice.candidates(scores), np.float32([0.1, 0.2, 0.3, 0.4]))
    selection = select(scores, 0.25, where=choice.where)
    assert selection.keep.tolist() == [False, False, False, False, True, True]
    assert selection.stats.dropped == {
        DropReason.BELOW_THRESHOLD: 2, DropReason.TORN: 1, DropReason.NOT_SELECTED: 1
    }  # fmt: skip


def test_a_shard_whose_table_lacks_the_column_fails_alone():
    with pytest.raises(ShardError, match="there is no column 'language'"):
        select(shard_scores([SampleRow("a", 0)]), None, where=Where("language == 'en'"))
