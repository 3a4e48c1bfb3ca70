import csv
import io
import itertools
import json
import math
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from clipfilter_wds.tables.formats.convert import converting_writer
from clipfilter_wds.tables.formats.open import SUFFIXES, open_table
from clipfilter_wds.tables.formats.rows import Wanted
from tests.support.pair_tables import read_records

PAIRS = [pair for pair in itertools.permutations([suffix[1:] for suffix in SUFFIXES], 2) if pair[0] != "tsv"]


def as_text(record: dict) -> dict:
    """A record as a CSV has it."""
    cells = {key: json.dumps(value) if isinstance(value, int | float) else value for key, value in record.items()}
    return {key: "" if value is None else value for key, value in cells.items()}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_kept_rows_are_written_as_the_type_that_the_output_is_named_for(
    call, folder, expected, threshold, tmp_path, source, target
):
    out = tmp_path / f"out.{target}"
    code, _, _ = call(folder / f"pairs.{source}", "--output", out, "--score_key", "s", threshold=threshold)
    assert code == 0
    rows = read_records(folder / f"pairs.{source}")
    kept = [(row, score) for row, score in zip(rows, expected, strict=True) if score >= threshold]
    found = read_records(out)
    assert [float(row.pop("s")) for row in found] == pytest.approx([score for _, score in kept], abs=1e-5)
    assert found == [as_text(row) if target in ("csv", "tsv") else row for row, _ in kept]


@pytest.mark.parametrize("target", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_where_nothing_is_kept_there_is_a_table_with_columns(call, folder, tmp_path, target):
    source = "parquet" if target == "csv" else "csv"
    out = tmp_path / f"out.{target}"
    assert call(folder / f"pairs.{source}", "--output", out, threshold=1)[0] == (2 if source == target else 0)
    assert read_records(out) == []
    if target == "parquet":
        assert pq.read_schema(out).names == ["id", "image", "caption", "n", "x"]
    elif target in ("csv", "tsv"):
        assert out.read_text() == ("," if target == "csv" else "\t").join(["id", "image", "caption", "n", "x"]) + "\n"


def test_bytes_stay_in_parquet(call, tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}], "caption": ["a"]}), tmp_path / "in.parquet")
    code, _, err = call(tmp_path / "in.parquet", "--output", tmp_path / "out.jsonl", model="/none")
    assert code == 2
    assert "column 'image' holds struct<bytes: binary, path: string>, and only parquet holds bytes" in err
    assert "name it 'out.parquet'" in err


def test_columns_of_one_name_are_not_merged(call, tmp_path):
    (tmp_path / "in.csv").write_text("image,caption,x,x\na.jpg,a,1,2\n")
    code, _, err = call(tmp_path / "in.csv", "--output", tmp_path / "out.jsonl", model="/none")
    assert code == 2
    assert "2 columns are called 'x'" in err


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
RECORDS = st.lists(st.dictionaries(st.sampled_from("abcd") | st.text(max_size=3), VALUES, max_size=4), max_size=6)


def convert(folder: Path, records: list[dict], suffix: str) -> Path:
    """Have records that all are kept written as another type."""
    records = [{"image": "a", "caption": "b"}, *records]
    (folder / "in.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    wanted = Wanted(image_key="image", caption_key="caption", score_key=None, num_rows=2)
    with open_table(folder / "in.jsonl", wanted) as reader, (folder / f"out{suffix}").open("wb") as file:
        writer = converting_writer(reader, file, suffix, None)
        for run in reader.read():
            writer.write(run, np.ones(len(run.images), dtype=bool), np.zeros(len(run.images), dtype=np.float32))
        writer.finish()
    return folder / f"out{suffix}"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_are_collected_where_the_output_lies(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    assert len(read_records(convert(tmp_path, [{"image": "c"}], suffix))) == 2


def clean(value: object) -> object:
    """Without halves of surrogate pairs."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def is_same(found: object, value: object) -> bool:
    """Whether a value came back: itself, an equal number, or its JSON."""
    if value is None or isinstance(value, str):
        return found == value
    if isinstance(found, str):
        return json.loads(found) == value
    if isinstance(value, list):
        return len(found) == len(value) and all(map(is_same, found, value))
    return math.isclose(found, value, rel_tol=0) if isinstance(value, float) else found == value


@settings(max_examples=100)
@given(RECORDS)
def test_whatever_the_records_hold_parquet_has_it(tmp_path_factory, records):
    table = pq.read_table(convert(tmp_path_factory.mktemp("convert"), records, ".parquet")).to_pylist()
    for found, record in zip(table[1:], map(clean, records), strict=True):
        assert {key for key, value in found.items() if value is not None} <= set(record)
        assert all(is_same(found[key], value) for key, value in record.items())


@settings(max_examples=100)
@given(RECORDS, st.sampled_from([".csv", ".tsv"]))
def test_whatever_the_records_hold_a_csv_has_it(tmp_path_factory, records, suffix):
    text = convert(tmp_path_factory.mktemp("convert"), records, suffix).read_bytes().decode()
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="," if suffix == ".csv" else "\t")
    for found, record in zip(list(reader)[1:], map(clean, records), strict=True):
        for key, value in record.items():
            assert found[key] == (
                "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            )
