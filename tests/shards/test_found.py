import json
import tarfile

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from clipfilter_wds.shards.found import FoundMembers
from tests.support.toys import raw_member, read_shard, tar_bytes


def members_of(data: bytes, **options: object) -> dict[str, int]:
    return dict(read_shard(data, pair_only=True, **options)[1].members)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_shard_tells_how_often_each_extension_came_whoever_reads_it(wanted):
    members = [(f"a/{key}.{extension}", b"x") for key in range(3) for extension in ("input.JPG", "0.txt")]
    data = tar_bytes([*members, ("a/3.input.jpg", b""), ("no_extension", b""), (".hidden", b"")])
    assert members_of(data, wanted=lambda index: wanted) == {"input.jpg": 4, "0.txt": 3, "": 1}


@pytest.mark.parametrize("wanted", [True, False])
def test_and_which_fields_of_the_first_json_hold_text(wanted):
    record = {"url": "x", "width": 5, "meta": {"caption": "y", "more": [{"a": "b"}]}, "captions": ["a", "b"]}
    members = [("0.json", json.dumps(record).encode()), ("1.json", b'{"other": "z"}')]
    found = members_of(tar_bytes(members), wanted=lambda index: wanted)
    assert found == {"json": 2, "json:url": 1, "json:meta.caption": 1, "json:meta.more": 1, "json:captions": 1}


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 5000, b"[]", b"7", b"\xff\xfe{", b'{"a": "b"}' + b" " * (1 << 16)])
def test_a_json_that_holds_no_object_or_is_large_has_no_fields(data):
    assert members_of(tar_bytes([("0.json", data)])) == {"json": 1}


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_counted_by_their_extension(kind):
    info = tarfile.TarInfo("0/1.jpg")
    info.type, info.linkname = kind, "0/0.jpg"
    found = members_of(raw_member(info) + tar_bytes([("0/1.txt", b"caption")]))
    assert found == {"link:jpg": 1, "txt": 1}


@settings(max_examples=50)
@given(st.lists(st.text(max_size=70) | st.integers(0, 100).map(str)))
def test_however_many_names_there_are_few_are_kept_and_those_are_counted_right(names):
    found = FoundMembers()
    for name in names:
        found.add(name)
    assert len(found.counts) <= 32
    assert all(len(name) <= 60 for name in found.counts)
    cut = [name[:60] for name in names]
    assert found.counts == {name: cut.count(name) for name in list(dict.fromkeys(cut))[:32]}
