import io
import json
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from clipfilter_wds.preprocess.members import decode_member, read_captions, read_uid
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.types import DropReason, Member, Sample
from tests.support.images import reason_of

JSON = SampleLayout(caption="json:caption")


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (b"a cat", "a cat"),
        (b"  a cat\n", "  a cat\n"),
        (b"a \xff cat", "a \ufffd cat"),
        (b"\xed\xa0\x80 cat", "\ufffd\ufffd\ufffd cat"),
        ("चूहा 🐁".encode(), "चूहा 🐁"),
        ("a cat".encode("utf-8-sig"), "a cat"),
        ("चूहा 🐁".encode("utf-16"), "चूहा 🐁"),
        (b"\xfe\xff\0a\0 \0c\0a\0t", "a cat"),
        (b"\xff\xfea\0?", "a\ufffd"),
        (b"", ""),
        (b'{"caption": "json"}', '{"caption": "json"}'),
    ],
)
def test_a_text_member_is_the_caption_as_it_is(data, caption):
    assert read_captions({"txt": data, "json": b'{"caption": "other"}'}, SampleLayout()) == [caption]


@pytest.mark.parametrize(
    ("record", "caption"),
    [
        ('{"caption": "a cat"}', "a cat"),
        ('{"caption": "\\ud83d\\udc08"}', "🐈"),
        ('{"caption": "half \\ud83d pair"}', "half ? pair"),
        ('{"caption": ""}', ""),
        ('{"caption": "first", "caption": "last"}', "last"),
        (b'{"caption": "a \xff cat"}', "a \ufffd cat"),
        ('{"width": NaN, "caption": "a cat"}', "a cat"),
    ],
)
def test_a_json_field_is_the_caption(record, caption):
    data = record if isinstance(record, bytes) else record.encode()
    found = read_captions({"json": data, "txt": b"other"}, JSON)
    assert found == [caption]
    found[0].encode()


@pytest.mark.parametrize(
    ("record", "field", "captions"),
    [
        ({"meta": {"caption": "a cat"}}, "meta.caption", ["a cat"]),
        ({"a": {"b": {"c": ["one", 5, "two"]}}}, "a.b.c", ["one", "two"]),
        ({"captions": [{"text": "one"}, {"other": "x"}, {"text": "two"}]}, "captions.text", ["one", "two"]),
        ([{"caption": "one"}, {"caption": "two"}], "caption", ["one", "two"]),
        ({"meta.caption": "flat", "meta": {"caption": "nested"}}, "meta.caption", ["flat"]),
        ({"a": {"b.c": "x"}}, "a.b.c", ["x"]),
        ({"": {"": "x"}}, ".", ["x"]),
    ],
)
def test_a_field_may_lie_in_other_fields_and_in_lists(record, field, captions):
    assert read_captions({"json": json.dumps(record).encode()}, SampleLayout(caption=f"json:{field}")) == captions


@pytest.mark.parametrize("record", [{}, {"meta": "caption"}, {"meta": {}}, {"meta": [["caption"]]}, {"caption": "x"}])
def test_a_field_that_does_not_lie_there_is_missing(record):
    layout = SampleLayout(caption="json:meta.caption")
    assert reason_of(read_captions, {"json": json.dumps(record).encode()}, layout) is DropReason.MISSING_CAPTION


field_names = st.text(st.characters(exclude_characters=",")).filter(lambda name: name and name == name.strip())


@settings(max_examples=100)
@given(st.lists(field_names, min_size=1, max_size=5), st.text(), st.booleans())
def test_any_path_of_fields_leads_to_the_text(names, text, as_list):
    record: object = [text] if as_list else text
    for name in reversed(names):
        record = {name: record}
    layout = SampleLayout(caption="json:" + ".".join(names))
    assert read_captions({"json": json.dumps(record).encode()}, layout) == [text]


@pytest.mark.parametrize(
    "record",
    [
        "{}",
        '{"Caption": "a cat"}',
        '{"caption": null}',
        '{"caption": 5}',
        '{"caption": []}',
        '{"caption": [5, null]}',
        '["caption"]',
        '"caption"',
        "null",
        "",
        "{",
        "[" * 100_000,
        '{"caption": 1' + "0" * 5000 + "}",
        b"\xff\xfe{",
    ],
    ids=lambda record: str(record[:20]),
)
def test_a_json_without_a_text_in_the_field_has_no_caption(record):
    data = record if isinstance(record, bytes) else record.encode()
    assert reason_of(read_captions, {"json": data, "txt": b"other"}, JSON) is DropReason.MISSING_CAPTION


@settings(max_examples=100)
@given(st.text() | st.none() | st.just(0) | st.lists(st.text()))
def test_any_text_in_a_json_field_comes_through(value):
    data = {"json": json.dumps({"caption": value}).encode()}
    if isinstance(value, str) or value:
        assert read_captions(data, JSON) == ([value] if isinstance(value, str) else value)
    else:
        assert reason_of(read_captions, data, JSON) is DropReason.MISSING_CAPTION


@settings(max_examples=100)
@given(st.binary())
def test_any_bytes_are_a_caption_that_the_tokenizer_takes(scorer, data):
    captions = read_captions({"txt": data}, SampleLayout())
    assert len(scorer.preprocess.tokenize([captions]).num_tokens) == 1


# --- large text ---

SMALL = {"max_text_bytes": 8}


@pytest.mark.parametrize(
    ("data", "caption"), [(b"12345678", "12345678"), (b"123456789", "12345678"), ("1234567ü".encode(), "1234567\ufffd")]
)
def test_of_a_large_text_the_beginning_is_the_caption(data, caption):
    assert read_captions({"txt": data}, SampleLayout(**SMALL)) == [caption]


@pytest.mark.parametrize("caption", ["json:a", "txt,json:a", "json:a,txt"])
def test_a_caption_in_a_json_that_is_too_large_has_a_reason_of_its_own(caption):
    data = {"txt": b"a", "json": b'{"a": 1}'}
    layout = SampleLayout(caption=caption, **SMALL)
    assert caption == "json:a" or read_captions(data, layout) == ["a"]
    assert reason_of(read_captions, {**data, "json": b'{"a": 12}'}, layout) is DropReason.TEXT_TOO_LARGE


@pytest.mark.parametrize("layout", [SampleLayout(caption="json:a"), SampleLayout(caption="json:a,json:b,txt")])
def test_an_image_has_a_thousand_captions_at_most(layout):
    record = {"a": ["x"] * 1000}
    assert len(read_captions({"json": json.dumps(record).encode()}, layout)) == 1000
    more = {"a": ["x"] * 1000, "b": ["y"]} if "txt" in layout.caption else {"a": ["x"] * 1001}
    assert reason_of(read_captions, {"json": json.dumps(more).encode()}, layout) is DropReason.TEXT_TOO_LARGE


# --- uid ---


def uid_of(data: bytes) -> bytes | None:
    member = Member(name="a.json", extension="json", data=data)
    return read_uid(Sample(key="a", index=0, members=(member,)))


@settings(max_examples=50)
@given(st.binary(min_size=16, max_size=16), st.dictionaries(st.text(), st.text() | st.integers()), st.booleans())
def test_a_uid_is_read_wherever_it_stands_in_the_object(uid, others, is_first):
    entry = {"uid": uid.hex()}
    record = {**entry, **others, **entry} if is_first else {**others, **entry}
    assert uid_of(json.dumps(record).encode("utf-8")) == uid


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"uid": 7}',
        b'{"uid": "%s"}' % (b"0" * 31),
        b'{"a": {"uid": "%s"}}' % (b"0" * 32),
        b'["uid", "%s"]' % (b"0" * 32),
        b'{"uid": "%s"' % (b"0" * 32),
        b'{"uid": "%s", "a": "%s"}' % (b"0" * 32, b"x" * (1 << 22)),
    ],
    ids=lambda data: str(data[:20]),
)
def test_a_json_without_a_uid_or_of_more_than_4_mib_gives_none(data):
    assert uid_of(data) is None


# --- other members ---


def array_file(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("extension", "data", "expected"),
    [
        ("txt", "é".encode(), "é"),
        ("alt.txt", b"\xef\xbb\xbfa", "a"),
        ("cls", b" 12\n", 12),
        ("json", b'{"a": [1]}', {"a": [1]}),
        ("json", b'{"a": ', None),
        ("json", b"{}" + b" " * (1 << 22), None),
        ("txt", b"a" * (1 << 22) + b"b", "a" * (1 << 22)),
        ("json", b"[" * 100_000, None),
        ("cls", b"a cat", None),
        ("cls", b"1" * 100_000, None),
        ("jpg", b"\xff", b"\xff"),
        ("pyd", pickle.dumps({"a": 1}), pickle.dumps({"a": 1})),
        ("pickle", b"cos\nsystem\n(S'false'\ntR.", b"cos\nsystem\n(S'false'\ntR."),
        ("npy", b"no array", None),
        ("npy", array_file(np.array([{}], dtype=object), allow_pickle=True), None),
        ("npy", array_file(np.zeros(3))[:-1], None),
        ("npy", array_file(np.zeros(3)).replace(b"(3,)", b"(3,("), None),
    ],
)
def test_a_member_is_what_its_extension_says_or_none(extension, data, expected):
    assert decode_member(extension, data) == expected


def test_a_numpy_array_is_read_and_one_that_is_too_large_is_none():
    assert decode_member("npy", array_file(np.arange(6).reshape(2, 3))).tolist() == [[0, 1, 2], [3, 4, 5]]
    for size in (10**9, 10**15):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (size,)})
        assert decode_member("npy", header.getvalue()) is None
