import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from clipfilter_wds.tables.file_storage import FileStorage
from tests.support.pace import FOREVER

TYPES = ["json", "jsonl", "csv", "parquet"]
RECORDS = [
    {"image": "a.png", "caption": "a cat", "code": "00017", "score": 0.1 + 0.2, "n": 1},
    {"image": "b/ü.png", "caption": 'NA, "None"\nnull', "code": "2024-01-01", "score": 1e-20, "n": 2},
]


@pytest.fixture
def storage(tmp_path):
    """Makes a storage whose first file has the given name and bytes."""

    def make(name: str, data: bytes = b"", cache_type: str = "jsonl") -> FileStorage:
        (tmp_path / name).write_bytes(data)
        return FileStorage(str(tmp_path / name), cache_path=str(tmp_path / "deep" / "cache"), cache_type=cache_type)

    return make


def jsonl(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


class TestSteps:
    @pytest.mark.parametrize("cache_type", TYPES)
    def test_each_step_reads_what_the_one_before_wrote(self, storage, tmp_path, cache_type):
        root = storage("in.jsonl", jsonl(*RECORDS), cache_type)
        first = root.step()
        table = first.read("dataframe")
        assert first.write(table) == str(tmp_path / "deep" / "cache" / f"dataflow_cache_step1.{cache_type}")
        second = root.step()
        pd.testing.assert_frame_equal(second.read("dataframe").drop(columns="code"), table.drop(columns="code"))
        second.write(second.read().iloc[1:])
        assert len(root.step().read("dict")) == 1
        assert sorted(path.name for path in (tmp_path / "deep" / "cache").iterdir()) == [
            f"dataflow_cache_step1.{cache_type}",
            f"dataflow_cache_step2.{cache_type}",
        ]

    def test_steps_that_were_handed_out_stay_at_their_step(self, storage):
        root = storage("in.jsonl", jsonl(*RECORDS))
        first, second = root.step(), root.step()
        first.write(first.read())
        assert second.read("dict") == RECORDS
        assert root.reset().step().operator_step == 0

    def test_before_the_first_step_nothing_is_read_or_overwritten(self, storage, tmp_path):
        root = storage("in.jsonl", jsonl(*RECORDS))
        with pytest.raises(RuntimeError, match=r"storage\.step\(\)"):
            root.read()
        with pytest.raises(RuntimeError, match=r"storage\.step\(\)"):
            root.write(pd.DataFrame())
        assert (tmp_path / "in.jsonl").read_bytes() == jsonl(*RECORDS)


class TestReading:
    @pytest.mark.parametrize("name", ["in.json", "in.jsonl", "in.parquet"])
    def test_strings_stay_strings_and_numbers_exact(self, storage, tmp_path, name):
        data = {"in.json": json.dumps(RECORDS).encode(), "in.jsonl": jsonl(*RECORDS), "in.parquet": b""}[name]
        root = storage(name, data)
        if name == "in.parquet":
            pd.DataFrame(RECORDS).to_parquet(tmp_path / name)
        assert root.step().read("dict") == RECORDS

    def test_only_an_empty_csv_cell_is_missing(self, storage):
        table = storage("in.csv", b"image,caption\na.png,NA\nb.png,None\nc.png,\n").step().read()
        assert table.caption.fillna("missing").to_list() == ["NA", "None", "missing"]

    @pytest.mark.parametrize("name", ["in.json", "in.jsonl", "in.csv"])
    def test_large_whole_numbers_stay_exact_where_some_rows_lack_them(self, storage, tmp_path, name):
        rows = [{"n": 2**53 + 1, "x": 2.0**60}, {"x": None}, {"n": -(2**62) - 1, "x": 0.5}]
        data = {
            "in.json": json.dumps(rows).encode(),
            "in.jsonl": jsonl(*rows),
            "in.csv": f"n,x\n{rows[0]['n']},1e18\n,\n{rows[2]['n']},0.5\n".encode(),
        }[name]
        first = storage(name, data).step()
        table = first.read()
        assert table["x"].dtype == "float64"
        assert [None if pd.isna(cell) else int(cell) for cell in table["n"]] == [2**53 + 1, None, -(2**62) - 1]
        written = [json.loads(line) for line in Path(first.write(table)).read_text().splitlines()]
        assert [row["n"] for row in written] == [2**53 + 1, None, -(2**62) - 1]

    def test_large_real_numbers_stay_real(self, storage):
        table = storage("in.csv", b"a,b,c\n1e30,1e17,0.5\n,,9e15\n1.5,2.5,\n").step().read()
        assert set(map(str, table.dtypes)) == {"float64"}

    def test_whole_numbers_of_more_than_64_bits_stay_exact(self, storage):
        first = storage("in.jsonl", jsonl({"n": 2**63 + 1}, {}, {"n": 2**53 + 1})).step()
        assert list(first.read()["n"]) == [2**63 + 1, None, 2**53 + 1]

    @pytest.mark.parametrize("rows", ["1,2,3\n4,5\n", "0,1,2\n1,3,4\n", "1,2,3,4\n", "1,2\n3,4,5\n"])
    def test_cells_of_a_row_that_has_too_many_are_not_moved(self, storage, rows):
        with pytest.raises(ValueError, match=r"more cells than the header|Expected 2 fields in line 3, saw 3"):
            storage("in.csv", f"image,caption\n{rows}".encode()).step().read()

    def test_commas_at_the_ends_of_lines_are_no_cells(self, storage):
        table = storage("in.csv", b"image,caption\na.jpg,a,\nb.jpg,b,\n").step().read("dict")
        assert table == [{"image": "a.jpg", "caption": "a"}, {"image": "b.jpg", "caption": "b"}]

    def test_upper_and_lower_case_are_the_same_in_a_suffix(self, storage):
        assert storage("in.JSONL", jsonl(*RECORDS)).step().read("dict") == RECORDS

    def test_bad_lines_are_passed_over_and_logged_with_their_numbers(self, storage, caplog):
        data = jsonl(RECORDS[0]) + b'\n{"image": \n[1, 2]\n\xff\xfe\n' + jsonl(RECORDS[1])
        with caplog.at_level(logging.WARNING):
            assert storage("in.jsonl", data).step().read("dict") == RECORDS
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith("passed over 3 lines of")
        assert all(text in message for text in ("line 3:", "line 4: it holds a list", "line 5:"))

    def test_a_file_with_only_bad_lines_is_an_error(self, storage):
        with pytest.raises(ValueError, match=r"can't read .*in\.jsonl' as jsonl: no line is a JSON object \(line 1"):
            storage("in.jsonl", b"[\n").step().read()

    def test_a_byte_order_mark_is_no_part_of_a_name(self, storage):
        mark = b"\xef\xbb\xbf"
        assert list(storage("in.csv", mark + b"image,caption\na,b\n").step().read()) == ["image", "caption"]
        assert list(storage("in.jsonl", mark + jsonl(RECORDS[0])).step().read()) == list(RECORDS[0])

    def test_half_a_surrogate_pair_is_replaced(self, storage):
        for name, data in {"in.jsonl": rb'{"caption": "a\ud800"}', "in.json": rb'[{"caption": "a\ud800"}]'}.items():
            assert storage(name, data).step().read("dict") == [{"caption": "a?"}]

    @pytest.mark.parametrize("name", ["in.pickle", "in.pkl"])
    def test_pickle_is_refused_with_the_reason(self, storage, name):
        with pytest.raises(ValueError, match="can run any code"):
            storage(name).step().read()

    def test_pickle_is_no_cache_type(self, storage):
        with pytest.raises(ValueError, match="cache_type: a pickle can run any code"):
            storage("in.jsonl", cache_type="pickle")

    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            ("in.parquet", b"no parquet", "as parquet"),
            ("in.json", b"{", "as json"),
            ("in.json", b"3", "as json: it holds no array of objects"),
            ("in.json", b"[1, 2]", "as json: it holds no array of objects"),
            ("in.json", b"[" * 100_000, "as json: it is nested too deeply"),
            ("in.jsonl", '{"a": 1}\n{"a": 2}\n'.encode("utf-16"), "as jsonl: it is in UTF-16"),
            ("in.csv", b'a,b\n1,2,3\n1,2,3,4\n"', "as csv"),
            ("in.tsv", b"", "'tsv' is no table format; use json, jsonl, csv, parquet"),
        ],
    )
    def test_what_is_no_table_is_an_error_that_names_the_file(self, storage, tmp_path, name, data, message):
        with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
            storage(name, data).step().read()

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
            FileStorage(str(tmp_path / "none.jsonl")).step().read()


class TestWriting:
    @pytest.mark.parametrize("cache_type", TYPES)
    def test_an_empty_table_can_be_read_again(self, storage, cache_type):
        root = storage("in.jsonl", jsonl(*RECORDS), cache_type)
        root.step().write(pd.DataFrame(RECORDS).iloc[:0])
        table = root.step().read()
        assert not len(table)
        if cache_type in ("csv", "parquet"):  # JSON has no place for the columns of no rows
            assert list(table.columns) == list(RECORDS[0])

    @pytest.mark.parametrize("cache_type", TYPES)
    def test_a_table_of_nothing_can_be_read_again(self, storage, cache_type):
        root = storage("in.jsonl", b"", cache_type)
        first = root.step()
        first.write(first.read())
        assert root.step().read().empty

    @pytest.mark.parametrize("cache_type", ["json", "jsonl"])
    def test_json_is_exact_and_missing_is_null(self, storage, tmp_path, cache_type):
        record = {**RECORDS[0], "list": [1, {"a": None}], "big": 2**62 + 1, "missing": float("nan"), "yes": True}
        table = pd.DataFrame([record]).assign(time=pd.Timestamp("2024-01-01"))
        root = storage("in.jsonl", b"", cache_type)
        text = open(root.step().write(table), encoding="utf-8").read()  # noqa: PTH123, SIM115
        (found,) = json.loads(text) if cache_type == "json" else [json.loads(text)]
        assert found == {**record, "missing": None, "time": "2024-01-01T00:00:00"}
        assert type(found["yes"]) is bool

    @pytest.mark.parametrize("cache_type", ["json", "jsonl", "csv"])
    @pytest.mark.parametrize("cell", [b"a", {"bytes": b"a", "path": "a.jpg"}, [b"a"]])
    def test_bytes_go_to_parquet_only(self, tmp_path, cache_type, cell):
        rows = pd.DataFrame({"image": pd.Series([None, cell], dtype=object), "caption": ["a", "b"]})
        storage = FileStorage("none.jsonl", cache_path=str(tmp_path), cache_type=cache_type).step()
        with pytest.raises(ValueError, match=r"column 'image' holds bytes, .* cache_type='parquet'"):
            storage.write(rows)
        assert list(tmp_path.iterdir()) == []
        FileStorage("none.jsonl", cache_path=str(tmp_path), cache_type="parquet").step().write(rows)
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("cache_type", ["json", "jsonl"])
    @pytest.mark.parametrize("columns", [["x", "x"], [1, "1"]])
    def test_columns_of_one_name_are_not_merged(self, storage, cache_type, columns):
        with pytest.raises(ValueError, match=f"2 columns are called '{columns[1]}'"):
            storage("in.jsonl", cache_type=cache_type).step().write(pd.DataFrame([[1, 2]], columns=columns))

    def test_lists_from_parquet_become_json(self, storage, tmp_path):
        root = storage("in.parquet")
        pd.DataFrame({"boxes": [[[1, 2], [3]]]}).to_parquet(tmp_path / "in.parquet")
        first = root.step()
        first.write(first.read())
        assert root.step().read("dict") == [{"boxes": [[1, 2], [3]]}]

    def test_a_list_of_dicts_is_a_table(self, storage):
        root = storage("in.jsonl")
        root.step().write(RECORDS)
        assert root.step().read("dict") == RECORDS
        with pytest.raises(TypeError, match="data is a Image"):
            root.write(Image.new("L", (1, 1)))

    def test_a_killed_writer_leaves_no_file_of_that_name(self, tmp_path):
        code = (
            "import pandas as pd\nfrom clipfilter_wds.tables.file_storage import FileStorage\n"
            "rows = pd.DataFrame({'a': ['x' * 1000] * 200_000})\nprint('ready', flush=True)\n"
            "FileStorage('in.jsonl').step().write(rows)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + FOREVER
        while not any((tmp_path / "cache").glob(".*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not (tmp_path / "cache" / "dataflow_cache_step1.jsonl").exists()
