import json

import pytest

from clipfilter_wds.preprocess.json_columns import JsonColumns
from clipfilter_wds.types import DropReason, Member, Sample


def sample(data: bytes | None) -> Sample:
    members = () if data is None else (Member(name="a.json", extension="json", data=data),)
    return Sample(key="a", index=0, members=members)


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        ("number", 0.25, 0.25), ("number", 3, 3.0), ("number", "0.25", None), ("number", True, None),
        ("number", float("nan"), None), ("number", 10**400, None), ("number", [1, 2], None), ("number", [1], 1.0),
        ("integer", 3, 3), ("integer", 2**53 + 1, 2**53 + 1), ("integer", 3.0, 3), ("integer", 3.5, None),
        ("integer", 2**63, None), ("integer", False, None), ("integer", float("inf"), None),
        ("text", "en", "en"), ("text", "", ""), ("text", 3, None), ("text", "\ud800", "?"),
        ("bool", True, True), ("bool", 0, None), ("number", None, None), ("text", {"a": "b"}, None),
    ],
)  # fmt: skip
def test_a_value_of_the_type_is_read_and_any_other_is_missing(kind, value, read):
    [found] = JsonColumns(f"json:meta.x={kind}").read(sample(json.dumps({"meta": {"x": value}}).encode()))
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    "data",
    [None, b"", b"{", b"[]", b"3", b'{"y": 1}', b"\xff\xfe{", b"[" * 10**5, b'{"x": 1, "p": "' + b" " * 2**22 + b'"}'],
)  # fmt: skip
def test_where_there_is_no_such_field_it_is_missing(data):
    assert JsonColumns("json:x,json:z=text").read(sample(data)) == (None, None)
    assert JsonColumns("json:x").read(Sample(key="a", index=0, problem=DropReason.TORN)) == (None,)


def test_fields_keep_their_names_and_order():
    columns = JsonColumns("json:b=text, json:a.c,json:n=integer")
    assert columns.sources == ("json:b=text", "json:a.c=number", "json:n=integer")
    assert columns.read(sample(b'{"n": 2, "a": {"c": 0.5}, "b": "x"}')) == ("x", 0.5, 2)


@pytest.mark.parametrize(
    "text",
    ["", "punsafe", "txt:x", "json:", "json:a..b", "json:a=float", "json:a,", "json:a=,x", "json:a json:b"],
)
def test_what_names_no_field_is_refused(text):
    with pytest.raises(ValueError, match=r"columns .* should be json:FIELD or json:FIELD=TYPE, with a TYPE of number"):
        JsonColumns(text)


def test_a_field_is_named_once():
    with pytest.raises(ValueError, match="names a field twice"):
        JsonColumns("json:a,json:a=text")
