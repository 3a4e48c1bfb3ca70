import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.pace import FOREVER
from tests.support.pair_tables import NUM_ROWS, SUFFIXES, read_records
from tests.support.score_tables import shard_scores, written
from tests.support.toys import encoded, photo


class TestKeptRows:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_the_rows_that_the_reference_keeps_are_kept_as_they_are(
        self, call, folder, expected, threshold, tmp_path, suffix
    ):
        code, out, _ = call(folder / f"pairs.{suffix}", "--output", tmp_path / f"kept.{suffix}", threshold=threshold)
        keep = expected >= threshold
        assert code == 0
        rows = read_records(folder / f"pairs.{suffix}")
        assert read_records(tmp_path / f"kept.{suffix}") == [row for row, kept in zip(rows, keep, strict=True) if kept]
        assert re.search(rf"seen +{NUM_ROWS}\b", out)
        assert re.search(rf"kept +{keep.sum()}\b", out)
        assert re.search(r"dropped: unreadable_image +1\b", out)
        assert re.search(rf"dropped: below_threshold +{NUM_ROWS - keep.sum() - 2}\b", out)
        assert "scored 0.0 as unreadable_image: 1, the first in row 3 (image 'images/none.jpg')" in out

    @pytest.mark.parametrize("suffix", ["jsonl", "csv"])
    def test_lines_are_kept_byte_for_byte(self, call, folder, expected, threshold, tmp_path, suffix):
        call(folder / f"pairs.{suffix}", "--output", tmp_path / f"kept.{suffix}", threshold=threshold)
        lines = (folder / f"pairs.{suffix}").read_bytes().splitlines(keepends=True)
        header = lines[:1] if suffix == "csv" else []
        rows = lines[len(header) :]
        kept = header + [row for row, score in zip(rows, expected, strict=True) if score >= threshold]
        assert (tmp_path / f"kept.{suffix}").read_bytes() == b"".join(kept)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_the_score_is_added_on_request(self, call, folder, expected, tmp_path, suffix):
        options = ("--score_key", "clip_score")
        code, out, _ = call(folder / f"pairs.{suffix}", "--output", tmp_path / f"all.{suffix}", *options, threshold=0)
        assert code == 0
        assert re.search(rf"kept +{NUM_ROWS}\b", out)
        rows = read_records(tmp_path / f"all.{suffix}")
        scores = [float(row.pop("clip_score")) for row in rows]
        assert rows == read_records(folder / f"pairs.{suffix}")
        assert np.abs(scores - expected).max() < 1e-5
        assert scores[3] == scores[4] == 0.0

    def test_nothing_kept_leaves_a_table_that_can_be_read(self, call, folder, tmp_path):
        for suffix in SUFFIXES:
            code, out, _ = call(folder / f"pairs.{suffix}", "--output", tmp_path / f"kept.{suffix}", threshold=1)
            assert code == 0
            says = f"none of {NUM_ROWS} rows is kept: {NUM_ROWS - 2} below_threshold, 1 .*, 1 .*. The threshold is 1; "
            assert re.search(f"{says}`--threshold 0 --score_key clip_score` writes all", " ".join(out.split()))
            assert "the kept rows are in" not in out
            assert read_records(tmp_path / f"kept.{suffix}") == []
        header = (folder / "pairs.csv").read_bytes().splitlines(keepends=True)[0]
        assert (tmp_path / "kept.csv").read_bytes() == header
        assert pq.read_schema(tmp_path / "kept.parquet").equals(pq.read_schema(folder / "pairs.parquet"))

    def test_an_empty_table_keeps_its_columns(self, call, tmp_path):
        contents = {"jsonl": b"", "csv": b"image,caption,n\r\n", "json": b"[]"}
        for suffix, content in contents.items():
            (tmp_path / f"in.{suffix}").write_bytes(content)
        schema = pa.schema([("image", pa.string()), ("caption", pa.large_string()), ("n", pa.int8())])
        pq.write_table(schema.empty_table(), tmp_path / "in.parquet")
        for suffix in SUFFIXES:
            assert call(tmp_path / f"in.{suffix}", "--output", tmp_path / f"out.{suffix}")[0] == 0
            assert read_records(tmp_path / f"out.{suffix}") == []
        assert (tmp_path / "out.csv").read_bytes() == contents["csv"]
        assert pq.read_schema(tmp_path / "out.parquet") == schema

    def test_the_number_of_workers_changes_nothing(self, call, folder, tmp_path):
        for workers in (0, 2):
            options = ("--num_workers", workers, "--batch_size", 7, "--score_key", "s")
            assert call(folder / "pairs.jsonl", "--output", tmp_path / f"{workers}.jsonl", *options)[0] == 0
        assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()

    def test_column_names_are_a_matter_of_choice(self, call, folder, tmp_path):
        rows = read_records(folder / "pairs.json")[:20]
        lines = [json.dumps({"image path": r["image"], "a/b.c": r["caption"], "id": r["id"]}) for r in rows]
        (folder / "named.jsonl").write_text("\n".join(lines))
        code, _, _ = call(
            folder / "named.jsonl", "--output", tmp_path / "kept.jsonl", "--image_key", "image path",
            "--caption_key", "a/b.c", threshold=0.01,
        )  # fmt: skip
        assert code == 0
        assert 0 < len(read_records(tmp_path / "kept.jsonl")) < 20


class TestUnusableArguments:
    """Found before any model is loaded: there is none of this name."""

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_missing_column_names_those_that_there_are(self, call, folder, tmp_path, suffix):
        options = ("--caption_key", "text")
        code, _, err = call(folder / f"pairs.{suffix}", "--output", tmp_path / f"o.{suffix}", *options, model="/none")
        assert code == 2
        assert "caption_key is 'text', but the table's columns are 'id', 'image', 'caption', 'n', 'x'" in err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("name", "output", "options", "message"),
        [
            ("pairs.jsonl", "out.xlsx", (), "output 'out.xlsx' is no .jsonl, .csv, .tsv, .parquet, .json file"),
            ("pairs.xlsx", "out.xlsx", (), "is no .jsonl, .csv, .tsv, .parquet, .json file"),
            ("0.tar.gz", "out.csv", (), "file; shards are for the commands rewrite and score"),
            ("pairs.jsonl", "out.jsonl", ("--keep_fraction", "0.5"), "give one"),
            ("none.jsonl", "out.jsonl", (), "is no file"),
            ("pairs.jsonl", "out.jsonl", ("--score_key", "n"), "but there is such a column"),
            ("pairs.jsonl", "out.jsonl", ("--batch_size", "0"), "batch_size is 0"),
            ("pairs.jsonl", "s3://bucket/out.jsonl", (), "on this machine only"),
            ("pairs.jsonl", "/dev/null/out.jsonl", (), "can't write to output"),
            ("pairs.jsonl", "out.jsonl", (), "there is no model folder"),
        ],
    )
    def test_each_is_an_error_of_one_line(self, call, folder, tmp_path, monkeypatch, name, output, options, message):
        monkeypatch.chdir(tmp_path)
        code, _, err = call(folder / name, "--output", output, *options, model="/none")
        assert code == 2
        assert message in " ".join(err.split())
        assert not list(tmp_path.iterdir())

    def test_a_threshold_that_is_no_cosine(self, call, folder, tmp_path):
        code, _, err = call(folder / "pairs.csv", "--output", tmp_path / "out.csv", threshold=25)
        assert code == 2
        assert "Did you mean 0.25?" in err

    def test_the_input_is_never_the_output(self, call, folder):
        before = (folder / "pairs.csv").read_bytes()
        code, _, err = call(folder / "pairs.csv", "--output", folder / "images" / ".." / "pairs.csv")
        assert (code, (folder / "pairs.csv").read_bytes()) == (2, before)
        assert "is the input itself" in err

    def test_a_score_table_is_never_replaced_and_other_tables_are(self, call, folder, tmp_path):
        path = tmp_path / "0.parquet"
        path.write_bytes(written(shard_scores([], shard="a/0.tar")))
        before = path.read_bytes()
        code, _, err = call(folder / "pairs.parquet", "--output", path, model="/none")
        assert (code, path.read_bytes()) == (2, before)
        assert "is the score table of 'a/0.tar', which is not replaced" in err
        for other in ((folder / "pairs.parquet").read_bytes(), b"no table"):
            path.write_bytes(other)
            assert "there is no model folder" in call(folder / "pairs.parquet", "--output", path, model="/none")[2]

    @pytest.mark.parametrize(("name", "data"), [("in.parquet", b"PAR1"), ("in.csv", b""), ("in.json", b'{"a": 1}')])
    def test_a_file_that_is_no_such_table(self, call, tmp_path, name, data):
        (tmp_path / name).write_bytes(data)
        code, _, err = call(tmp_path / name, "--output", tmp_path / f"out{Path(name).suffix}", model="/none")
        assert code == 2
        assert f"can't use '{tmp_path / name}'" in err


class _Waiting(BaseHTTPRequestHandler):
    """Serves images until it is told to let requests wait."""

    release = threading.Event()
    image = encoded(photo(1))

    def do_GET(self):
        if "late" in self.path:
            self.release.wait(FOREVER)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.image)

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_a_killed_run_leaves_no_output_and_the_next_one_no_leftovers(clip_folder, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Waiting)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    names = [*(f"{number}.jpg" for number in range(64)), "late.jpg"]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"image": f"{url}/{n}", "caption": "a"}) for n in names))
    (tmp_path / "out.jsonl").write_text("from before")
    command = [
        sys.executable, "-m", "clipfilter_wds", "table", "in.jsonl", "--output", "out.jsonl",
        "--model", str(clip_folder), "--threshold", "0", "--batch_size", "8", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    leftovers = lambda: list(tmp_path.glob(".*"))  # noqa: E731
    deadline = time.monotonic() + FOREVER
    while not leftovers():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out.jsonl").read_text() == "from before"
    assert len(leftovers()) == 1
    _Waiting.release.set()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=FOREVER)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert re.search(r"kept +65\b", done.stdout)
    assert len(read_records(tmp_path / "out.jsonl")) == 65
    assert not leftovers()


def peak_bytes(command: list[str]) -> int:
    """The most memory of its own that a command and its workers take, summed."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                total += one.memory_full_info().uss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_memory_does_not_grow_with_the_table(clip_folder, tmp_path, suffix):
    """Rows of 4 kB; their captions are blank, so that reading and writing is all there is to do."""
    peaks = {}
    rng = np.random.default_rng(0)
    for num_rows in (5_000, 100_000):
        path = tmp_path / f"{num_rows}.{suffix}"
        texts = [rng.bytes(2000).hex() for _ in range(num_rows)]
        columns = {"image": ["a.jpg"] * num_rows, "caption": [""] * num_rows, "text": texts}
        if suffix == "parquet":
            pq.write_table(pa.table(columns), path, row_group_size=num_rows, use_dictionary=False, compression="none")
        elif suffix == "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
        else:
            rows = zip(*columns.values(), strict=True)
            path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
        del texts, columns
        command = [
            sys.executable, "-m", "clipfilter_wds", "table", str(path), "--output", str(tmp_path / f"out.{suffix}"),
            "--model", str(clip_folder), "--threshold", "0", "--score_key", "clip_score", "--device", "cpu",
        ]  # fmt: skip
        peaks[num_rows] = peak_bytes(command)
        assert (tmp_path / f"out.{suffix}").stat().st_size >= path.stat().st_size
    # The larger table is 380 MB larger.
    assert peaks[100_000] - peaks[5_000] < 150e6, peaks
