import json
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from clipfilter_wds.offline.copying import shard_stats
from clipfilter_wds.offline.tally import ShardStats, Tally
from clipfilter_wds.types import DropReason, FilterStats, SampleRow
from tests.support.score_tables import shard_scores

numbers = st.integers(0, 1000)


@st.composite
def all_stats(draw) -> ShardStats:
    dropped = draw(st.dictionaries(st.sampled_from(DropReason), st.integers(1, 1000)))
    kept = draw(numbers)
    return ShardStats(
        counts=FilterStats(seen=kept + sum(dropped.values()), kept=kept, dropped=dropped),
        torn=draw(numbers),
        truncated_captions=draw(numbers),
        band=draw(st.floats(0, 2)),
        rechecked=draw(numbers),
        in_band=draw(numbers),
        renamed_keys=draw(numbers),
        members=draw(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 1000))),
        null_columns=draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 1000))),
        torn_names=tuple(sorted(draw(st.sets(st.sampled_from("abcde"))))),
    )


@given(all_stats())
def test_stats_are_the_same_after_a_trip_through_json_among_other_entries(stats):
    assert ShardStats.from_record(json.loads(json.dumps({**stats.to_record(), "sha256": "0"}))) == stats


@given(st.lists(all_stats()))
def test_a_tally_sums_up_all_that_is_counted_and_takes_the_widest_band(shards):
    tally = Tally(num_shards=len(shards))
    for stats in shards:
        tally.add(stats)
    summary = tally.summary()
    assert tally.done == len(shards)
    assert summary["seen"] == summary["kept"] + sum(summary["dropped"].values())
    records = [stats.to_record() for stats in shards]
    for name in ("seen", "kept", "truncated_captions", "rechecked", "in_band", "renamed_keys"):
        assert summary[name] == sum(record[name] for record in records)
    assert summary["torn_shards"] == sum(record["torn"] for record in records)
    assert summary["band"] == max((record["band"] for record in records), default=0.0)
    for reason in DropReason:
        assert summary["dropped"].get(reason, 0) == sum(record["dropped"].get(reason, 0) for record in records)
    names = sum((Counter(stats.members) for stats in shards), Counter())
    assert summary.get("members", {}) == names
    nulls = sum((Counter(stats.null_columns) for stats in shards), Counter())
    assert summary.get("null_columns", {}) == nulls
    assert summary.get("torn_names", []) == sorted(set().union(*(stats.torn_names for stats in shards)))


def test_the_names_of_marks_and_summaries_and_their_order_do_not_change():
    stats = ["seen", "kept", "dropped", "torn", "truncated_captions", "band", "rechecked", "in_band", "renamed_keys"]
    assert list(ShardStats().to_record()) == stats
    summary = ["seen", "kept", "dropped", "shards", "failed_shards", "torn_shards", "resumed_shards"]
    summary += ["truncated_captions", "band", "rechecked", "in_band", "renamed_keys"]
    summary += ["scored", "samples_per_second", "seconds", "version"]
    assert list(Tally(num_shards=0).summary()) == summary


def test_of_very_many_torn_shards_the_first_are_kept():
    shards = [ShardStats(torn=1, torn_names=(f"{number:02d}.tar",)) for number in range(20)]
    total = sum(reversed(shards), ShardStats())
    assert (total.torn, total.torn_names) == (20, tuple(f"{number:02d}.tar" for number in range(10)))


def test_of_very_many_names_of_members_the_most_frequent_are_kept():
    shards = [ShardStats(members={f"{number}.jpg": 1, "jpg": 2}) for number in range(100)]
    members = sum(shards, ShardStats()).members
    assert len(members) == 64
    assert members["jpg"] == 200


@pytest.mark.parametrize(
    ("reasons", "kept"),
    [
        ([None, None], {}),
        ([None, "missing_image"], {"link:jpg": 1}),
        (["unreadable_image", "blank_caption"], {}),
        ([None, "missing_image", "missing_caption"], {"input.jpg": 3, "link:jpg": 1}),
        (["missing_image"], {"input.jpg": 3, "link:jpg": 1}),
        ([], {"input.jpg": 3, "link:jpg": 1}),
    ],
)
def test_stats_tell_what_members_are_called_where_most_samples_lack_one_and_of_links_where_any_does(reasons, kept):
    rows = [SampleRow(str(index), index, reason and DropReason(reason)) for index, reason in enumerate(reasons)]
    scores = shard_scores(rows, members={"input.jpg": 3, "link:jpg": 1})
    assert shard_stats(FilterStats(), scores).members == kept


class TestShare:
    """How much of a run is done."""

    def test_it_grows_with_every_batch_and_ends_at_one(self):
        tally = Tally(num_shards=4)
        shares = [tally.share]
        for _ in range(4):
            for _ in range(5):
                tally.num_scored += 20
                shares.append(tally.share)
            tally.add(ShardStats(counts=FilterStats(seen=100, kept=100)))
            shares.append(tally.share)
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
        assert shares[8] == pytest.approx(1.4 / 4)  # a shard, and two batches of the next

    def test_samples_of_an_earlier_run_are_not_taken_for_begun_ones(self):
        tally = Tally(num_shards=4, resumed=1, num_resumed=100)
        tally.add(ShardStats(counts=FilterStats(seen=100, kept=100)))
        assert tally.share == 0.25
        tally.num_scored += 50
        assert tally.share == pytest.approx(1.5 / 4)

    def test_unfinished_shards_never_count_as_finished(self):
        tally = Tally(num_shards=2, num_scored=10**6)
        assert tally.share < 1.0
