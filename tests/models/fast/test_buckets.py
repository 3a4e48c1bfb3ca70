import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clipfilter_wds.models.fast.buckets import ROW_COUNTS, caption_lengths, group_by_length, row_count


@given(st.integers(1, 3000))
def test_a_batch_is_filled_up_to_the_next_row_count(num_rows):
    count = row_count(num_rows)
    assert count in ROW_COUNTS
    assert count >= min(num_rows, ROW_COUNTS[-1])
    assert all(other < num_rows for other in ROW_COUNTS if other < count)
    if num_rows >= ROW_COUNTS[0]:
        assert count < 2 * num_rows


def test_captions_are_filled_up_to_a_few_lengths_but_never_beyond_what_the_tower_takes():
    assert caption_lengths(77, pads_to_max=False) == (16, 24, 32, 48, 77)
    assert caption_lengths(52, pads_to_max=False) == (16, 24, 32, 48, 52)
    assert caption_lengths(16, pads_to_max=False) == (16,)
    assert caption_lengths(64, pads_to_max=True) == (64,)


@given(st.data(), st.integers(1, 200), st.booleans())
def test_every_caption_is_in_one_group_that_is_long_enough(data, max_length, pads_to_max):
    lengths = caption_lengths(max_length, pads_to_max=pads_to_max)
    used = np.array(data.draw(st.lists(st.integers(1, max_length), min_size=1, max_size=300)))
    groups = group_by_length(used, lengths)
    assert sorted(np.concatenate([group.rows for group in groups]).tolist()) == list(range(len(used)))
    for group in groups:
        assert group.length in lengths
        assert 0 < len(group.rows) <= ROW_COUNTS[-1]
        longest = used[group.rows].max()
        assert group.length == min(length for length in lengths if length >= longest)
    assert [group.length for group in groups] == sorted((group.length for group in groups), reverse=True)


@given(st.lists(st.integers(1, 77), min_size=1, max_size=300))
def test_filling_up_is_left_to_the_last_group(used):
    groups = group_by_length(np.array(used), caption_lengths(77, pads_to_max=False))
    assert all(len(group.rows) in ROW_COUNTS for group in groups[:-1])
    assert len(groups) <= 5


def test_more_captions_than_the_most_rows_are_split():
    groups = group_by_length(np.full(2500, 9), (16,))
    assert [len(group.rows) for group in groups] == [1024, 1024, 452]
