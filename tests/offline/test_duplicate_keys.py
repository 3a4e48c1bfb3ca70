from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import example, given, settings

from clipfilter_wds.offline.duplicate_keys import find_suffixes, suffixes_of_neighbours

# Keys that look like others with a suffix.
keys = st.sampled_from(["a", "b", "a_1", "a_2", "a__1", "a_1_1", "b_1"]) | st.text(max_size=3)


@settings(max_examples=300)
@given(st.lists(st.lists(keys, max_size=6), max_size=5))
@example([])
@example([["a", "a"], ["a_1", "a__1"], ["a"]])
def test_all_keys_differ_and_the_first_of_each_keeps_its_name(shards):
    suffixes = find_suffixes(lambda: iter(shards))
    all_keys = [key for keys in shards for key in keys]
    suffix_of = suffixes.between(0, len(all_keys))
    names = [key + suffix_of.get(place, "") for place, key in enumerate(all_keys)]
    assert len(set(names)) == len(names)
    for place, key in enumerate(all_keys):
        assert (place in suffix_of) == (key in all_keys[:place])


def test_a_part_of_the_run_gets_its_own_suffixes():
    suffixes = find_suffixes(lambda: iter([["a", "b", "a"], ["c", "a", "b"]]))
    assert suffixes.between(0, 2) == {}
    assert suffixes.between(2, 5) == {0: "_1", 2: "_2"}
    assert suffixes.between(5, 6) == {0: "_1"}


@settings(max_examples=300)
@given(st.lists(keys, max_size=8), st.lists(keys, max_size=3))
def test_no_two_neighbours_have_one_key_and_no_other_key_is_changed(kept, dropped):
    suffixes = suffixes_of_neighbours(kept, [*kept, *dropped])
    names = [key + suffixes.get(place, "") for place, key in enumerate(kept)]
    assert all(name != following for name, following in pairwise(names))
    assert list(suffixes) == [place for place in range(1, len(kept)) if kept[place] == kept[place - 1]]
    assert not {names[place] for place in suffixes} & {*kept, *dropped}
