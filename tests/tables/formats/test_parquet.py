import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter_wds.tables.formats.parquet import ParquetReader
from clipfilter_wds.tables.formats.rows import Wanted
from tests.support.pair_tables import NUM_ROWS, read_records


def test_parquet_keeps_schema_metadata_and_compression(call, folder, tmp_path):
    call(folder / "pairs.parquet", "--output", tmp_path / "kept.parquet")
    before, after = (pq.ParquetFile(path) for path in (folder / "pairs.parquet", tmp_path / "kept.parquet"))
    assert after.schema_arrow.equals(before.schema_arrow, check_metadata=True)
    assert after.metadata.row_group(0).column(1).compression == "ZSTD"
    assert after.metadata.num_row_groups == 1


@pytest.mark.parametrize("entry", ["element", "item"])
def test_each_column_keeps_its_compression(call, folder, tmp_path, entry):
    columns = {"list": [["images/1.jpg"]], "more": [{"x": 1, "y": "a"}], "caption": ["photo"]}
    chosen = {f"list.list.{entry}": "brotli", "more.x": "gzip", "more.y": "none", "caption": "zstd"}
    options = {"compression": chosen, "use_compliant_nested_type": entry == "element"}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet", **options)
    options = ("--output", tmp_path / "out.parquet", "--image_key", "list", "--score_key", "s")
    assert call(tmp_path / "in.parquet", *options, threshold=0)[0] == 0
    group = pq.ParquetFile(tmp_path / "out.parquet").metadata.row_group(0)
    found = {group.column(index).path_in_schema: group.column(index).compression for index in range(5)}
    assert list(found.values()) == ["BROTLI", "GZIP", "UNCOMPRESSED", "ZSTD", "ZSTD"]


#: As Hugging Face's tables have images: as struct, with features in the metadata.
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_METADATA = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}


#: Forms of image cells: path, bytes (None for the row without a file) -> cell; and their type.
_FORMS = {
    "struct": (lambda path, data: {"bytes": data, "path": path.name}, _IMAGE),
    "struct of bytes": (lambda _, data: {"bytes": data}, pa.struct([("bytes", pa.binary())])),
    "struct of paths": (lambda path, _: {"bytes": None, "path": str(path)}, _IMAGE),
    "binary": (lambda _, data: data, pa.binary()),
    "large binary": (lambda _, data: data, pa.large_binary()),
    "binary view": (lambda _, data: data, pa.binary_view()),
    "string view": (lambda path, _: str(path), pa.string_view()),
    "list view": (lambda path, _: [str(path)], pa.list_view(pa.string())),
    "list of structs": (lambda path, data: [{"bytes": data, "path": path.name}], pa.list_(_IMAGE)),
    "list of paths": (lambda path, _: [str(path)], pa.large_list(pa.string())),
    "fixed list": (lambda path, _: [str(path)], pa.list_(pa.string(), 1)),
}


@pytest.mark.parametrize("form", _FORMS)
def test_images_in_any_form_are_scored_and_their_rows_kept(call, folder, expected, threshold, tmp_path, form):
    rows = read_records(folder / "pairs.json")
    paths = [folder / row["image"] for row in rows]
    cell, cell_type = _FORMS[form]
    images = [cell(path, path.read_bytes() if path.exists() else None) for path in paths]
    columns = {"image": pa.array(images, cell_type), "caption": [row["caption"] for row in rows], "n": range(NUM_ROWS)}
    pq.write_table(pa.table(columns).replace_schema_metadata(_METADATA), tmp_path / "in.parquet", row_group_size=30)
    options = ("--num_workers", 2 if form == "struct" else 0)
    code, _, _ = call(tmp_path / "in.parquet", "--output", tmp_path / "out.parquet", *options, threshold=threshold)
    assert code == 0
    before, after = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("in", "out"))
    assert after.schema.equals(before.schema, check_metadata=True)
    assert after.to_pylist() == [
        row for row, score in zip(before.to_pylist(), expected, strict=True) if score >= threshold
    ]


def test_a_row_of_several_images_is_dropped_for_that(call, folder, tmp_path):
    images = [["images/0.jpg", "images/1.jpg"], ["images/2.jpg"], []]
    pq.write_table(pa.table({"image": images, "caption": ["a"] * 3}), tmp_path / "in.parquet")
    code, out, _ = call(tmp_path / "in.parquet", "--output", tmp_path / "out.parquet", threshold=0.0001)
    assert code == 0
    assert "scored 0.0 as several_images: 1, the first in row 0 (image 'images/0.jpg, images/1.jpg')" in out
    assert "scored 0.0 as missing_image: 1, the first in row 2 (image None)" in out


@pytest.mark.parametrize(
    ("image", "caption", "message"),
    [
        ({"url": "a.jpg"}, "a", "column 'image' holds struct<url: string>; images are paths"),
        ("a.jpg", b"a", "column 'caption' holds binary; captions are text"),
        ("a.jpg", {"en": "a"}, "column 'caption' holds struct<en: string>; captions are text"),
    ],
)
def test_columns_of_other_types_are_refused(call, tmp_path, image, caption, message):
    pq.write_table(pa.table({"image": [image], "caption": [caption]}), tmp_path / "in.parquet")
    code, _, err = call(tmp_path / "in.parquet", "--output", tmp_path / "out.parquet", model="/none")
    assert code == 2
    assert message in err


def test_runs_of_large_images_are_short(tmp_path):
    images = [bytes([number]) * 1_000_000 for number in range(40)] + [b"small"] * 40
    pq.write_table(pa.table({"image": images, "caption": ["a"] * 80}), tmp_path / "in.parquet", row_group_size=25)
    wanted = Wanted(image_key="image", caption_key="caption", score_key=None, num_rows=32)
    with (tmp_path / "in.parquet").open("rb") as file:
        runs = list(ParquetReader(file, wanted).read())
    assert [image for run in runs for image in run.images] == images
    assert max(sum(map(len, run.images)) for run in runs) <= 18_000_000
    assert len(runs) < 8


def test_bytes_of_any_type_stay_in_parquet(call, tmp_path):
    for kind in (pa.binary_view(), pa.list_view(pa.binary_view())):
        images = pa.array([b"a"] if kind == pa.binary_view() else [[b"a"]], kind)
        pq.write_table(pa.table({"image": images, "caption": ["a"]}), tmp_path / "in.parquet")
        code, _, err = call(tmp_path / "in.parquet", "--output", tmp_path / "out.jsonl", model="/none")
        assert code == 2
        assert "only parquet holds bytes" in err


@pytest.mark.parametrize("target", [pytest.param("out.parquet", marks=pytest.mark.slow), "out.csv"])
def test_a_damaged_table_fails_in_one_line_that_names_it(clip_folder, tmp_path, target):
    names = [f"{number}.jpg" for number in range(200)]
    pq.write_table(pa.table({"image": names, "caption": [None] * 200}), tmp_path / "in.parquet", compression="none")
    data = (tmp_path / "in.parquet").read_bytes()
    for broken in (data.replace(b"199.jpg", b"\xff" * 7, 1), data[:4] + bytes(200) + data[204:]):
        (tmp_path / "in.parquet").write_bytes(broken)
        command = ["table", tmp_path / "in.parquet", "--output", tmp_path / target, "--model", clip_folder]
        command = [sys.executable, "-m", "clipfilter_wds", *map(str, command), "--num_workers", "0", "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert f"clipfilter-wds: can't read '{tmp_path}/in.parquet' behind row " in line
        assert not (tmp_path / target).exists()
