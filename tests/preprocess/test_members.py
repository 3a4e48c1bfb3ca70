import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from clipfilter_wds.preprocess.members import read_captions
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.types import DropReason
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
