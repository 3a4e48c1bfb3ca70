import logging
from dataclasses import replace

import numpy as np
import pytest

from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.keep_rate import KeepRateWatch, StarvationError
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.training.stream import PartEnd
from clipfilter_wds.types import DropReason, ShardEnd
from tests.support.toys import write_shard

SCORES = np.linspace(0.0, 0.2, 21, dtype=np.float32)


def test_many_samples_in_a_row_that_are_dropped_are_an_error_that_explains_itself():
    watch = KeepRateWatch(0.25, 40, SampleLayout())
    watch.add(SCORES, seen=21, kept=0)
    with pytest.raises(StarvationError) as raised:
        watch.add(SCORES, seen=21, kept=0)
    message = str(raised.value)
    assert "the last 42 samples left none" in message
    assert "threshold is 0.25" in message
    assert "0%: 0.000, 5%: 0.010, 25%: 0.050, 50%: 0.100, 75%: 0.150, 95%: 0.190, 100%: 0.200" in message
    assert "Lower the threshold" in message


def test_one_kept_sample_ends_the_row():
    watch = KeepRateWatch(0.25, 40, SampleLayout())
    for _ in range(20):
        watch.add(SCORES, seen=39, kept=0)
        watch.add(SCORES, seen=21, kept=1)


def test_samples_that_could_not_be_scored_count_and_the_error_says_so():
    watch = KeepRateWatch(0.25, 100, SampleLayout())
    with pytest.raises(StarvationError, match="No sample could be scored"):
        watch.add(np.empty(0, dtype=np.float32), seen=100, kept=0)


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize(
    ("members", "layout", "cure"),
    [
        ({"input.jpg": b"", "txt": b"a cat"}, {}, "layout=SampleLayout(image='input.jpg')"),
        ({"a.jpg": b"", "b.txt": b"a cat"}, {}, "layout=SampleLayout(image='a.jpg', caption='b.txt')"),
        ({"jpg": b"", "txt": b"a cat"}, {"caption": "text"}, "layout=SampleLayout(caption='txt')"),
    ],
)
def test_where_samples_lack_something_the_error_names_their_members(
    scorer, tmp_path, members, layout, cure, num_workers
):
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", [members] * 6)
    dataset = ClipWebDataset(f"{tmp_path}/*.tar", scorer.preprocess, layout=SampleLayout(**layout))
    with pytest.raises(StarvationError) as raised:
        next(iter(ClipFilterLoader(dataset, scorer, num_workers=num_workers)))
    message = str(raised.value)
    assert all(f"{extension} (12)" in message for extension in members)
    assert message.endswith(f"Name the right ones: {cure}")
    assert "12 of 12 samples lack" in message


def test_samples_that_lack_nothing_are_no_reason_to_name_members():
    watch, end = KeepRateWatch(0.25, 100, SampleLayout()), ShardEnd(num_samples=9, torn=False, num_bytes=0)
    ends = [PartEnd("0.tar", replace(end, members={"jpg": 9, "txt": 9}))]
    watch.add(SCORES, seen=99, kept=0, unusable={DropReason.MISSING_IMAGE: 89}, ends=ends)
    with pytest.raises(StarvationError, match="Lower the threshold"):
        watch.add(SCORES, seen=1, kept=0)


@pytest.mark.parametrize(("before", "after", "warns"), [(10, 0, True), (10, 1, True), (10, 5, False), (1, 1, False)])
def test_a_keep_rate_that_collapses_is_warned_of_once(caplog, before, after, warns):
    watch = KeepRateWatch(0.25, 100_000, SampleLayout())
    with caplog.at_level(logging.WARNING):
        for _ in range(300):
            watch.add(SCORES, seen=21, kept=before)
        assert not caplog.records
        for _ in range(100):
            watch.add(SCORES, seen=21, kept=after)
    assert len(caplog.records) == warns
    if warns:
        assert "has the data changed?" in caplog.text
        assert "threshold is 0.25" in caplog.text


def test_a_low_but_steady_keep_rate_is_no_news(caplog):
    watch, rng = KeepRateWatch(0.25, 100_000, SampleLayout()), np.random.default_rng(0)
    with caplog.at_level(logging.WARNING):
        for kept in rng.binomial(64, 0.2, size=2000):
            watch.add(SCORES, seen=64, kept=int(kept))
        watch = KeepRateWatch(0.25, 100_000, SampleLayout())
        for kept in rng.binomial(64, 0.003, size=2000):
            watch.add(SCORES, seen=64, kept=int(kept))
    assert not caplog.records


def test_the_ends_of_many_streams_are_no_collapse(caplog):
    watch = KeepRateWatch(0.25, 100_000, SampleLayout())
    with caplog.at_level(logging.WARNING):
        for _ in range(200):
            watch.add(SCORES, seen=21, kept=10)
        for _ in range(40):
            watch.add(SCORES[:0], seen=0, kept=0)
    assert not caplog.records
