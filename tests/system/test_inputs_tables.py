"""Each line that the page on inputs says of tables is true."""

import functools
import http.server
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.pages import lines_of
from tests.support.pair_tables import read_records
from tests.support.toys import encoded, photo

JPEG = encoded(photo(1))


class Tables:
    """A folder with an image ``a.jpg``, and the command that filters tables in it."""

    def __init__(self, folder: Path, command: Callable[..., tuple[int, str]]) -> None:
        self.folder, self._command = folder, command
        (folder / "a.jpg").write_bytes(JPEG)

    def run(self, source: str, target: str, *options: object) -> tuple[int, str]:
        """Run the command with a threshold that keeps every row."""
        return self._command(
            "table", self.folder / source, "--output", self.folder / target, "--model", "demo-tiny", "--device", "cpu",
            "--num_workers", 0, *(options or ("--threshold", 0)),
        )  # fmt: skip

    def text(self, name: str, text: str, encoding: str = "utf-8") -> None:
        (self.folder / name).write_bytes(text.encode(encoding))

    def all_kept(self, name: str, num_rows: int) -> list[dict]:
        """The rows of a table that all could be scored, read back from the output."""
        target = f"out{Path(name).suffix}"
        code, shown = self.run(name, target)
        assert (code, "scored 0.0" in shown) == (0, False), shown
        rows = read_records(self.folder / target)
        assert len(rows) == num_rows
        return rows

    def parquet(self, name: str = "in.parquet", **columns: object) -> None:
        pq.write_table(pa.table(columns), self.folder / name)

    def reason(self, image: object, caption: object) -> str | None:
        """Why a row could not be scored."""
        (self.folder / "in.jsonl").write_text(json.dumps({"image": image, "caption": caption}))
        code, shown = self.run("in.jsonl", "out.jsonl")
        assert code == 0, shown
        found = re.search(r"scored 0.0 as (\w+): 1, the first in row 0", shown)
        return found and found[1]


@pytest.fixture
def tables(tmp_path, command):
    return Tables(tmp_path, command)


CHECKS: dict[str, Callable[[Tables], None]] = {}


def line(cell: str) -> Callable[[Callable[[Tables], None]], None]:
    """The check of the line whose first cell this is."""
    return functools.partial(CHECKS.__setitem__, cell)


@line("`.jsonl`")
def json_lines(tables):
    text = '\ufeff{"image": "a.jpg", "caption": "a"}\r\n\r\n{"image": "a.jpg", "caption": "b"}'
    tables.text("in.jsonl", text)
    assert [row["caption"] for row in tables.all_kept("in.jsonl", 2)] == ["a", "b"]


@line("`.json`")
def json_array(tables):
    tables.text("in.json", '[\n{"image": "a.jpg",\n "caption": "a"}]')
    tables.all_kept("in.json", 1)
    tables.text("object.json", '{"image": "a.jpg", "caption": "a"}')
    assert "not an array" in tables.run("object.json", "o.json")[1]


@line("`.csv`")
def separated(tables):
    for delimiter in (",", "\t", ";", "|"):
        tables.text("in.csv", f"image{delimiter}caption\na.jpg{delimiter}a\n")
        assert tables.run("in.csv", "out.jsonl")[0] == 0
        assert read_records(tables.folder / "out.jsonl") == [{"image": "a.jpg", "caption": "a"}]


@line("`.tsv`")
def tabs(tables):
    tables.text("in.tsv", "image\tcaption\na.jpg\ta, b\n")
    assert tables.all_kept("in.tsv", 1) == [{"image": "a.jpg", "caption": "a, b"}]


@line("`.parquet`")
def parquet(tables):
    tables.parquet(image=["a.jpg"], caption=["a"], n=[1], nested=[{"x": [1.5]}], raw=[b"\0"])
    tables.all_kept("in.parquet", 1)


@line("a path")
def path(tables):
    assert tables.reason("a.jpg", "a") is None
    assert tables.reason(str(tables.folder / "a.jpg"), "a") is None


@line("an `http(s)://` or other fsspec URL")
def url(tables):
    assert tables.reason(f"file://{tables.folder}/a.jpg", "a") is None
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tables.folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert tables.reason(f"http://127.0.0.1:{server.server_port}/a.jpg", "a") is None
        server.shutdown()


def stored(tables: Tables, image: object) -> None:
    tables.parquet(image=[image], caption=["a"])
    tables.all_kept("in.parquet", 1)


@line("the bytes of an image file (parquet)")
def image_bytes(tables):
    stored(tables, JPEG)


@line('`{"bytes": ..., "path": ...}`, as Hugging Face\'s tables have it')
def struct(tables):
    stored(tables, {"bytes": JPEG, "path": "elsewhere.jpg"})
    stored(tables, {"bytes": None, "path": "a.jpg"})


@line("a list of one of these")
def list_of_one(tables):
    assert tables.reason(["a.jpg"], "a") is None
    stored(tables, [{"bytes": JPEG, "path": None}])


@line("a list of several")
def several(tables):
    assert tables.reason(["a.jpg", "a.jpg"], "a") == "several_images"


@line("empty, null, NaN, an empty list")
def no_image(tables):
    for image in ("", None, float("nan"), []):
        assert tables.reason(image, "a") == "missing_image"


@line("a file that is no image, or is not there")
def no_picture(tables):
    tables.text("text.jpg", "no image")
    for image in ("text.jpg", "nowhere.jpg"):
        assert tables.reason(image, "a") == "unreadable_image"


@line("text")
def text(tables):
    assert tables.reason("a.jpg", "a red circle") is None


@line("a number")
def number(tables):
    assert tables.reason("a.jpg", 2024) is None


@line("a list of one text or number")
def caption_list(tables):
    for caption in (["a"], [3], [["a"]]):
        assert tables.reason("a.jpg", caption) is None


@line("empty, blank, null, NaN, several")
def blank(tables):
    for caption in ("", " \t", None, float("nan"), ["a", "b"]):
        assert tables.reason("a.jpg", caption) == "blank_caption"


def check_passed_over(tables, name: str, text: str, num_lines: int, says: str) -> str:
    """All that is shown of a table, of which some lines are passed over."""
    tables.text(name, text)
    code, shown = tables.run(name, f"out{Path(name).suffix}")
    assert code == 0
    assert re.search(rf"lines passed over +{num_lines}\b", shown)
    assert says in shown
    return shown


@line("a line of JSON that holds no object")
def bad_json(tables):
    text = '{"image": "a.jpg", "caption": "a"}\n{"image": \n[]\n'
    check_passed_over(tables, "in.jsonl", text, 2, "line 2:")


@line("a row with more cells than the header")
def long_row(tables):
    check_passed_over(tables, "in.csv", "image,caption\na.jpg,a\na.jpg,a,b\n", 1, "line 3: it has 3 cells")


@line("a quote that is never closed, with all lines behind it")
def open_quote(tables):
    text = 'image,caption\na.jpg,a\na.jpg,"b\na.jpg,c\na.jpg,d\n'
    shown = check_passed_over(tables, "in.csv", text, 3, "lines 3 to 5: its quote is never closed")
    assert re.search(r"seen +1\b", shown)


@line("a line of a CSV of more than 16,777,216 characters")
def long_line(tables):
    text = f"image,caption\na.jpg,a\na.jpg,{'b' * 17_000_000}\n"
    check_passed_over(tables, "in.csv", text, 1, "line 3: it is longer")


@line("a row with fewer cells")
def short_row(tables):
    tables.text("in.csv", "image,caption,x\na.jpg,a\n")
    tables.run("in.csv", "out.jsonl")
    assert read_records(tables.folder / "out.jsonl") == [{"image": "a.jpg", "caption": "a", "x": ""}]


@line("a column that is not there")
def no_column(tables):
    tables.text("in.csv", "picture,text\na.jpg,a\n")
    code, shown = tables.run("in.csv", "out.csv")
    assert code == 2
    assert "'picture', 'text'" in shown


@line("a table in UTF-16 (but for `.json`), or without a header")
def unusable(tables):
    tables.text("in.csv", "image,caption\na.jpg,a\n", "utf-16")
    assert tables.run("in.csv", "out.csv")[0] == 2
    tables.text("in.jsonl", '{"image": "a.jpg", "caption": "a"}\n', "utf-16")
    assert tables.run("in.jsonl", "out.jsonl")[0] == 2
    tables.text("in.json", '[{"image": "a.jpg", "caption": "a"}]', "utf-16")
    tables.all_kept("in.json", 1)
    tables.text("in.csv", "a.jpg,a\n")
    assert tables.run("in.csv", "out.csv")[0] == 2


@line("the input's type")
def same_type(tables):
    content = '{"caption":"a",  "image":"a.jpg","n":1.50}\n'
    tables.text("in.jsonl", content)
    tables.all_kept("in.jsonl", 1)
    assert (tables.folder / "out.jsonl").read_text() == content
    tables.parquet(image=["a.jpg"], caption=["a"], n=pa.array([1], pa.int8()))
    tables.all_kept("in.parquet", 1)
    assert pq.read_schema(tables.folder / "out.parquet") == pq.read_schema(tables.folder / "in.parquet")


@line("`.jsonl` or `.json`, from another type")
def to_json(tables):
    tables.text("in.csv", "image,caption,n\na.jpg,a,007\n")
    day = pa.array([20000], pa.date32())
    tables.parquet(image=["a.jpg"], caption=["a"], n=[7], day=day)
    for target in ("out.jsonl", "out.json"):
        tables.run("in.csv", target)
        assert read_records(tables.folder / target) == [{"image": "a.jpg", "caption": "a", "n": "007"}]
        tables.run("in.parquet", target)
        assert read_records(tables.folder / target)[0]["day"] == "2024-10-04"


@line("`.csv` or `.tsv`, from another type")
def to_csv(tables):
    pair = {"image": "a.jpg", "caption": "a"}
    rows = [pair | {"x": [1, 2]}, pair | {"y": {"z": None}, "w": None}]
    tables.text("in.jsonl", "\n".join(map(json.dumps, rows)))
    for target in ("out.csv", "out.tsv"):
        tables.run("in.jsonl", target)
        first, second = read_records(tables.folder / target)
        assert list(first) == ["image", "caption", "x", "y", "w"]
        assert (first["x"], first["y"], second["y"], second["w"]) == ("[1, 2]", "", '{"z": null}', "")


@line("`.parquet`, from another type")
def to_parquet(tables):
    rows = [
        {"image": "a.jpg", "caption": "a", "b": True, "n": 1, "x": 1, "l": [1], "o": {"k": 1}, "m": 1},
        {"image": "a.jpg", "caption": "b", "b": False, "n": 2, "x": 0.5, "l": [], "o": None, "m": "text"},
    ]
    tables.text("in.jsonl", "\n".join(map(json.dumps, rows)))
    tables.run("in.jsonl", "out.parquet")
    table = pq.read_table(tables.folder / "out.parquet")
    types = {field.name: field.type for field in table.schema}
    assert (types["b"], types["n"], types["x"]) == (pa.bool_(), pa.int64(), pa.float64())
    assert types["l"].value_type == pa.int64()
    assert table["o"].to_pylist() == ['{"k": 1}', None]
    assert table["m"].to_pylist() == ["1", "text"]


@line("another type than parquet, from parquet with bytes")
def no_bytes(tables):
    tables.parquet(image=[JPEG], caption=["a"])
    code, shown = tables.run("in.parquet", "out.jsonl")
    assert (code, "only parquet holds bytes" in shown) == (2, True)


def test_every_line_has_a_check():
    assert sorted(cells[0] for cells in lines_of("Tables")) == sorted(CHECKS)


@pytest.mark.parametrize("cell", CHECKS)
def test_the_line_is_true(cell, tables):
    CHECKS[cell](tables)


def test_with_a_fraction_what_cannot_be_scored_is_never_kept(tables):
    tables.text("in.csv", "image,caption\nnowhere.jpg,a\na.jpg,b\n")
    code, shown = tables.run("in.csv", "out.csv", "--keep_fraction", 1)
    assert code == 0
    assert [row["caption"] for row in read_records(tables.folder / "out.csv")] == ["b"]
    assert "scored 0.0 as unreadable_image: 1, the first in row 0 (image 'nowhere.jpg')" in shown
