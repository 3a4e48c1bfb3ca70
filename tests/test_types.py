import dataclasses
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from clipfilter_wds.types import DropReason, FilterStats, Member, Sample, ShardEnd

drops = st.dictionaries(st.sampled_from(DropReason), st.integers(0, 10**9))
stats = st.builds(
    lambda kept, dropped: FilterStats(seen=kept + sum(dropped.values()), kept=kept, dropped=dropped),
    st.integers(0, 10**9),
    drops,
)


@given(st.integers(0, 1000), drops, st.integers(-1000, 1000).filter(bool))
def test_counts_that_do_not_close_are_refused_with_all_counts_named(kept, dropped, off):
    seen = kept + sum(dropped.values()) + off
    with pytest.raises(ValueError, match="lost or counted twice") as error:
        FilterStats(seen=seen, kept=kept, dropped=dropped)
    assert f"seen {seen}" in str(error.value)
    assert f"kept {kept}" in str(error.value)


@given(stats, stats, stats)
def test_adding_counts_is_plain_addition_in_any_order(a, b, c):
    total = a + b + c
    assert total == c + (b + a)
    assert total.seen == a.seen + b.seen + c.seen
    assert total.kept == a.kept + b.kept + c.kept
    for reason in DropReason:
        assert total.dropped.get(reason, 0) == sum(one.dropped.get(reason, 0) for one in (a, b, c))


@given(stats, stats)
def test_summed_reasons_stand_in_the_order_of_the_enum(a, b):
    reasons = list((a + b).dropped)
    assert reasons == [reason for reason in DropReason if reason in a.dropped or reason in b.dropped]


@given(stats)
def test_an_empty_count_changes_nothing(one):
    assert FilterStats() + one == one + FilterStats() == one


@pytest.mark.parametrize(("kept", "dropped", "rate"), [(0, 0, 0.0), (0, 4, 0.0), (1, 3, 0.25), (4, 0, 1.0)])
def test_keep_rate_is_the_share_that_was_kept(kept, dropped, rate):
    counts = FilterStats(seen=kept + dropped, kept=kept, dropped={DropReason.TORN: dropped})
    assert counts.keep_rate == rate


def test_reasons_are_the_documented_words_and_json_ready():
    documented = {
        "below_threshold",
        "blank_caption",
        "missing_caption",
        "missing_image",
        "unreadable_image",
        "image_too_large",
        "member_too_large",
        "torn",
        "not_in_subset",
        "not_finite",
        "text_too_large",
    }
    assert documented <= set(json.loads(json.dumps(list(DropReason))))


def test_a_reason_prints_as_its_word_wherever_it_stands():
    assert f"{DropReason.TORN} {str(DropReason.TORN)!s}" == "torn torn"
    stats = FilterStats(seen=3, kept=1, dropped={DropReason.TORN: 2})
    assert repr(stats) == "FilterStats(seen=3, kept=1, dropped={'torn': 2})"


@pytest.mark.parametrize(
    "value",
    [
        Member(name="a.jpg", extension="jpg", data=b""),
        Sample(key="a", index=0),
        ShardEnd(num_samples=0, torn=False, num_bytes=0),
        FilterStats(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_vocabulary_is_frozen_and_named_by_keyword(value):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)
    with pytest.raises(TypeError):
        type(value)("positional")
