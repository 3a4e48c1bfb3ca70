import io
import json
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from clipfilter_wds.tables.formats.json import JsonLinesReader
from clipfilter_wds.tables.formats.rows import Wanted


def test_bad_json_lines_are_passed_over_and_reported_with_their_numbers(call, folder, tmp_path):
    good = (folder / "pairs.jsonl").read_text().splitlines()[:6]
    lines = ["\ufeff" + good[0], "", '{"image": ', *good[1:], "[1]", *["nonsense"] * 9, "[" * 100_000]
    (folder / "odd.jsonl").write_text("\r\n".join(lines))
    code, out, _ = call(folder / "odd.jsonl", "--output", tmp_path / "kept.jsonl", threshold=0)
    assert code == 0
    assert (tmp_path / "kept.jsonl").read_text().splitlines() == good
    assert re.search(r"seen +6\b", out)
    assert re.search(r"lines passed over +12\b", out)
    assert "passed over line 3: Expecting value" in out
    assert "line 9: it holds a list, not an object" in out
    assert "and 7 more" in out


def test_a_file_of_bad_lines_only_is_an_error(call, folder, tmp_path):
    code, _, err = call(folder / "pairs.json", "--output", tmp_path / "kept.json")
    assert code == 0
    (tmp_path / "array.jsonl").write_bytes((folder / "pairs.json").read_bytes())
    code, _, err = call(tmp_path / "array.jsonl", "--output", tmp_path / "kept.jsonl", model="/no/model")
    assert code == 2
    assert "there is no JSON object in it (line 1:" in err


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_json_lines_in_utf16_are_named(call, tmp_path, encoding):
    line = '{"image": "a.jpg", "caption": "a"}\n'
    (tmp_path / "in.jsonl").write_text(line * 3, encoding=encoding, newline="")
    code, _, err = call(tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", model="/none")
    assert code == 2
    assert "in.jsonl': it is in UTF-16 or UTF-32; save it as UTF-8" in err


def test_an_array_in_an_array_in_an_array_is_an_error(call, tmp_path):
    (tmp_path / "in.json").write_text("[" * 100_000)
    code, _, err = call(tmp_path / "in.json", "--output", tmp_path / "out.json", model="/none")
    assert code == 2
    assert "in.json': it is nested too deeply" in err


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(), st.none() | st.floats(allow_nan=False) | st.integers() | st.text())))
def test_whatever_the_records_hold_they_come_back_with_a_score(tmp_path_factory, records):
    records = [{"image": "a", "caption": "b"}, *records]
    path = tmp_path_factory.mktemp("jsonl") / "in.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    out = io.BytesIO()
    with path.open("rb") as file:
        reader = JsonLinesReader(file, Wanted(image_key="image", caption_key="caption", score_key="s", num_rows=2))
        writer = reader.writer(out)
        for run in reader.read():
            num_rows = len(run.images)
            writer.write(run, np.ones(num_rows, dtype=bool), np.full(num_rows, 0.5, dtype=np.float32))
        writer.finish()
    found = [json.loads(line) for line in out.getvalue().decode().split("\n")[:-1]]
    assert found == [{**record, "s": 0.5} for record in records]


def test_lines_that_get_a_score_stay_as_they_are_otherwise(tmp_path):
    lines = [
        b'{"image": "a", "caption": "\\u00e9", "n": 0.10000000000000000000001, "big": 1e400 }',
        b'{"image":"b","caption":"\xc3\xa9","image":"c"}',
        b"{ }",
        b'{"s": 1, "image": "d"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\r\n".join(lines))
    out = io.BytesIO()
    with (tmp_path / "in.jsonl").open("rb") as file:
        reader = JsonLinesReader(file, Wanted(image_key="image", caption_key="caption", score_key="s", num_rows=9))
        writer = reader.writer(out)
        for run in reader.read():
            writer.write(run, np.ones(4, dtype=bool), np.full(4, 0.5, dtype=np.float32))
    assert out.getvalue().split(b"\n") == [
        b'{"image": "a", "caption": "\\u00e9", "n": 0.10000000000000000000001, "big": 1e400, "s": 0.5}',
        b'{"image":"b","caption":"\xc3\xa9","image":"c", "s": 0.5}',
        b'{"s": 0.5}',
        b'{"s": 0.5, "image": "d"}',
    ]
