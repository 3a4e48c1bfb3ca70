import csv
import io
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from clipfilter_wds.tables.formats.csv import COMMA_FIRST, CsvReader
from clipfilter_wds.tables.formats.rows import Wanted


def test_a_csv_of_odd_lines(call, folder, tmp_path):
    data = (
        b'\xef\xbb\xbfimage,caption,"my ""note"""\r\n'
        b'images/1.jpg,"two\r\nlines, and a comma",\xe9 is latin-1\r\n'
        b"\r\n"
        b"images/2.jpg,short row\r\n"
        b"images/3.jpg,a,b,c,d\r\n"
        b'images/5.jpg,5" of pipe,\r\n'
        b'images/6.jpg,"never closed,x\r\n'
    )
    (folder / "odd.csv").write_bytes(data)
    options = ("--score_key", "clip, score")
    code, out, _ = call(folder / "odd.csv", "--output", tmp_path / "kept.csv", *options, threshold=0)
    assert code == 0
    header, *rows = csv.reader(io.StringIO((tmp_path / "kept.csv").read_bytes().decode("latin-1"), newline=""))
    assert header == ["image", "caption", 'my "note"', "clip, score"]
    assert [row[:3] for row in rows] == [
        ["images/1.jpg", "two\r\nlines, and a comma", "é is latin-1"],
        ["images/2.jpg", "short row", ""],
        ["images/5.jpg", '5" of pipe', ""],
    ]
    assert all(0.0 <= float(row[3]) <= 1.0 for row in rows)
    assert re.search(r"lines passed over +2\b", out)
    assert "line 6: it has 5 cells; the header names 3 columns; line 8: its quote is never closed" in out


def _rows_of(path, **wanted):
    """Cells of images and captions, and the lines that were passed over; what a writer makes of all rows."""
    wanted = Wanted(image_key="image", caption_key="caption", num_rows=2, **{"score_key": None, **wanted})
    out, rows = io.BytesIO(), []
    with path.open("rb") as file:
        reader = CsvReader(file, wanted)
        writer = reader.writer(out)
        for run in reader.read():
            rows += zip(run.images, run.captions, strict=True)
            writer.write(run, np.ones(len(run.images), dtype=bool), np.zeros(len(run.images), dtype=np.float32))
    return rows, reader.bad_lines, out.getvalue()


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_very_long_line_is_passed_over_whole(tmp_path, quote):
    long = quote + "y" * 17_000_000 + quote
    (tmp_path / "in.csv").write_text(f"image,caption,x\na.jpg,a,1\nb.jpg,b,{long}\nc.jpg,c,3\nd.jpg,d,{long}")
    rows, bad_lines, written = _rows_of(tmp_path / "in.csv")
    assert rows == [("a.jpg", "a"), ("c.jpg", "c")]
    assert written == b"image,caption,x\na.jpg,a,1\nc.jpg,c,3\n"
    assert str(bad_lines) == (
        "line 3: it is longer than 16,777,216 characters; line 5: it is longer than 16,777,216 characters"
    )


def test_all_lines_behind_a_quote_that_is_never_closed_are_counted(tmp_path):
    rest = [f"{number}.jpg,{number},x" for number in range(500)]
    (tmp_path / "in.csv").write_text("\n".join(["image,caption,x", "a.jpg,a,1", "a,b,c,d", 'b.jpg,"b,2', *rest]))
    rows, bad_lines, _ = _rows_of(tmp_path / "in.csv")
    assert rows == [("a.jpg", "a")]
    assert bad_lines.count == 502
    assert str(bad_lines) == (
        "line 3: it has 4 cells; the header names 3 columns; lines 4 to 504: its quote is never closed"
    )


def test_blank_lines_before_the_header_are_passed_over(tmp_path):
    (tmp_path / "in.csv").write_text("\n\r\nimage,caption\na.jpg,a\n", newline="")
    rows, bad_lines, written = _rows_of(tmp_path / "in.csv")
    assert (rows, bad_lines.count, written) == ([("a.jpg", "a")], 0, b"image,caption\na.jpg,a\n")


@pytest.mark.parametrize("kind", ["csv ;", "csv |", "csv \t", "tsv \t", "tsv ,"])
def test_what_is_between_the_cells_is_seen_in_the_header(call, folder, expected, threshold, tmp_path, kind):
    suffix, _, delimiter = kind.partition(" ")
    source, target = (tmp_path / f"{name}.{suffix}" for name in ("in", "out"))
    with (folder / "pairs.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    with source.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    (tmp_path / "images").symlink_to(folder / "images")
    assert call(source, "--output", target, "--score_key", "s", threshold=threshold)[0] == 0
    with target.open(newline="") as file:
        found_header, *found = csv.reader(file, delimiter=delimiter)
    assert found_header == [*header, "s"]
    assert [row[:-1] for row in found] == [row for row, s in zip(rows, expected, strict=True) if s >= threshold]
    before, after = (path.read_bytes().splitlines() for path in (source, target))
    assert {line.rpartition(delimiter.encode())[0] for line in after} <= set(before)


def test_a_header_without_the_columns_is_named_as_it_was_read(call, tmp_path):
    (tmp_path / "in.tsv").write_text("a caption, with a comma\thttp://images/1.jpg\nanother\thttp://images/2.jpg\n")
    code, _, err = call(tmp_path / "in.tsv", "--output", tmp_path / "out.tsv", model="/none")
    assert code == 2
    assert "the table's columns are 'a caption, with a comma', 'http://images/1.jpg'" in err


def test_a_table_in_utf16_is_named(call, tmp_path):
    (tmp_path / "in.csv").write_text("image,caption\na.jpg,a\n", encoding="utf-16")
    code, _, err = call(tmp_path / "in.csv", "--output", tmp_path / "out.csv", model="/none")
    assert code == 2
    assert "UTF-16" in err


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=3, max_size=3)),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(COMMA_FIRST),
)
def test_whatever_the_cells_hold_csv_rows_come_back_with_a_score(tmp_path_factory, rows, quoting, line_end, delimiter):
    if quoting == csv.QUOTE_MINIMAL:  # the csv module writes a carriage return without quotes, and ends a row there
        rows = [[cell.replace("\r", "") for cell in row] for row in rows]
    path = tmp_path_factory.mktemp("csv") / "in.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=line_end)
        writer.writerows([["image", "caption", "x"], *rows])
    out = io.BytesIO()
    with path.open("rb") as file:
        reader = CsvReader(file, Wanted(image_key="image", caption_key="caption", score_key="s", num_rows=2))
        writer = reader.writer(out)
        for run in reader.read():
            num_rows = len(run.images)
            writer.write(run, np.ones(num_rows, dtype=bool), np.full(num_rows, 0.5, dtype=np.float32))
    assert reader.bad_lines.count == 0
    found = list(csv.reader(io.StringIO(out.getvalue().decode(), newline=""), delimiter=delimiter))
    assert found == [["image", "caption", "x", "s"], *([*row, "0.5"] for row in rows)]
