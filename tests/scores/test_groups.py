import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from clipfilter_wds.scores import fraction
from clipfilter_wds.scores.fraction import find_group_cutoffs
from clipfilter_wds.scores.groups import GroupCutoffs, Groups, rows_by_group
from clipfilter_wds.scores.selection import Choice, select
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import DropReason, SampleRow, ShardError
from tests.support.score_tables import shard_scores

LANGUAGES = [None, "en", "de", "ja"]


def table(scores: list[float], languages: list[str | None]) -> ShardScores:
    plain = shard_scores([SampleRow(str(index), index) for index in range(len(scores))], scores)
    joined = plain.table.append_column("language", pa.array(languages, pa.string()))
    return ShardScores(table=joined, metadata=plain.metadata)


pairs = st.tuples(st.sampled_from([-0.5, 0.0, 0.1, 0.2, 0.3]) | st.floats(-1, 1, width=32), st.sampled_from(LANGUAGES))


@given(st.lists(st.lists(pairs, max_size=12), max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_of_each_group_its_own_fraction_is_kept_as_sorting_would(shards, fraction, of_english):
    choice = Choice(keep_fraction=fraction, groups=Groups(column="language", limits={"en": of_english}))
    tables = [table([score for score, _ in shard], [language for _, language in shard]) for shard in shards]
    cutoffs = find_group_cutoffs(lambda: map(choice.candidates_by_group, tables), choice.fraction_of)
    kept = [choice.select(one, GroupCutoffs(cutoff)).keep.tolist() for one, cutoff in zip(tables, cutoffs, strict=True)]
    expected = [[False] * len(shard) for shard in shards]
    for language in LANGUAGES:
        rows = [(-np.float32(score), shard, index) for shard, own in enumerate(shards)
                for index, (score, found) in enumerate(own) if found == language]  # fmt: skip
        for _, shard, index in sorted(rows)[: round((of_english if language == "en" else fraction) * len(rows))]:
            expected[shard][index] = True
    assert kept == expected


@given(st.lists(st.sampled_from(["null", "en", "de"])))
def test_each_row_is_in_the_group_that_is_its_own(languages):
    found = rows_by_group(np.array(languages, dtype=object))
    assert sorted(row for rows in found.values() for row in rows) == list(range(len(languages)))
    assert all(rows == sorted(rows) and {languages[row] for row in rows} == {name} for name, rows in found.items())


def test_groups_have_thresholds_of_their_own():
    scores = table([0.3, 0.3, 0.3, 0.1], ["en", "de", None, "en"])
    choice = Choice(threshold=0.25, groups=Groups.parse("language", "de=0.35, null=-0.5"))
    selection = choice.select(scores, None)
    assert selection.keep.tolist() == [True, False, True, False]
    assert selection.stats.dropped == {DropReason.BELOW_THRESHOLD: 2}


def test_groups_are_called_as_json_has_their_values():
    scores = table([0.3] * 3, ["en", "de", None])
    flags = pa.array([True, False, None])
    joined = ShardScores(table=scores.table.append_column("flag", flags), metadata=scores.metadata)
    assert Groups(column="flag").of(joined).tolist() == ["true", "false", "null"]


@pytest.mark.parametrize("limits", ["", "en", "en=", "=0.3", "en=high", "en=0.3,"])
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(ValueError, match=r"should be GROUP=NUMBER, such as en=0.28"):
        Groups.parse("language", limits)


def test_a_group_has_one_limit():
    with pytest.raises(ValueError, match="gives the group 'en' two limits"):
        Groups.parse("language", "en=0.3,de=0.2,en=0.4")


def test_so_many_groups_that_they_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(fraction, "_MOST_GROUPS", 3)
    shards = [{f"{number}": np.float32([number])} for number in range(4)]
    assert find_group_cutoffs(lambda: shards[:3], lambda group: 1.0)
    with pytest.raises(ValueError, match=r"more than 3 groups, .* group by a column of fewer values"):
        find_group_cutoffs(lambda: shards, lambda group: 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.2, "groups": Groups(column="a", limits={"en": 28})}, "threshold is 28"),
        ({"keep_fraction": 0.2, "groups": Groups(column="a", limits={"en": 28})}, "a group's limit is 28"),
        (
            {"threshold": 0.2, "groups": Groups(column="a")},
            "group_by 'a' changes nothing .* give some a threshold of their own with group_limits, .* or give keep_",
        ),
        ({"groups": Groups(column="a")}, "group_by needs a threshold or keep_fraction"),
    ],
)
def test_limits_that_can_not_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Choice(**options)


def test_a_shard_whose_table_lacks_the_column_fails_alone():
    with pytest.raises(ShardError, match="group_by: there is no column 'language'; the tables have key"):
        select(shard_scores([SampleRow("a", 0)]), 0.2, groups=Groups(column="language"))
