import pyarrow as pa
import pyarrow.parquet as pq


def test_parquet_keeps_schema_metadata_and_compression(call, folder, tmp_path):
    call(folder / "pairs.parquet", "--output", tmp_path / "kept.parquet")
    before, after = (pq.ParquetFile(path) for path in (folder / "pairs.parquet", tmp_path / "kept.parquet"))
    assert after.schema_arrow.equals(before.schema_arrow, check_metadata=True)
    assert after.metadata.row_group(0).column(1).compression == "ZSTD"
    assert after.metadata.num_row_groups == 1


def test_parquet_with_image_bytes_is_refused(call, tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}], "caption": ["a"]}), tmp_path / "in.parquet")
    code, _, err = call(tmp_path / "in.parquet", "--output", tmp_path / "out.parquet", model="/none")
    assert code == 2
    assert "column 'image' holds struct<bytes: binary, path: string>" in err
