import hashlib
import io
import json
import math

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from clipfilter_wds.scores.fingerprint import check_fingerprint
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.names import output_names, public_url
from clipfilter_wds.types import DropReason, SampleRow, ShardError

FINGERPRINT = {
    "model": "m",
    "weights": "0" * 64,
    "resize": 32,
    "crop": [32, 32],
    "mean": [0.5, 0.25],
    "nested": {"a": 1},
}
COLUMNS = {
    "key": pa.string(),
    "index": pa.int32(),
    "score": pa.float32(),
    "reason": pa.string(),
    "num_tokens": pa.int32(),
    "truncated": pa.bool_(),
    "width": pa.int32(),
    "height": pa.int32(),
    "uid": pa.binary(16),
}


def shard_scores(rows: list[SampleRow], scores=None, **changes) -> ShardScores:
    if scores is None:
        scores = np.linspace(-1, 1, sum(row.reason is None for row in rows), dtype=np.float32)
    options = {"source": "/data/0.tar", "num_bytes": 10_240, "torn": False, "fingerprint": FINGERPRINT, **changes}
    return ShardScores.from_rows(rows, np.asarray(scores, dtype=np.float32), **options)


def written(scores: ShardScores) -> bytes:
    file = io.BytesIO()
    scores.write(file)
    return file.getvalue()


def read_back(tmp_path, scores: ShardScores) -> ShardScores:
    path = tmp_path / "0.parquet"
    path.write_bytes(written(scores))
    return ShardScores.read(path)


row_lists = st.lists(
    st.builds(
        SampleRow,
        st.text(),
        st.just(0),
        st.none() | st.sampled_from(DropReason),
        st.integers(0, 2**31 - 1),
        st.booleans(),
        st.integers(0, 2**31 - 1),
        st.integers(0, 2**31 - 1),
    ),
    max_size=8,
).map(lambda rows: [SampleRow(row.key, index, *_rest(row)) for index, row in enumerate(rows)])
floats = st.floats(width=32, allow_nan=True)


def _rest(row: SampleRow) -> tuple:
    return row.reason, row.num_tokens, row.truncated, row.width, row.height


@settings(max_examples=100, deadline=None)
@given(row_lists, st.data(), st.booleans(), st.integers(-1, 2**40), st.text())
def test_a_table_reads_as_it_was_written(tmp_path_factory, rows, data, torn, num_bytes, source):
    drawn = {row.index: data.draw(floats) for row in rows if row.reason is None}
    cosines = np.array(list(drawn.values()), dtype=np.float32)
    reasons = [row.reason if math.isfinite(drawn.get(row.index, 0.0)) else DropReason.NOT_FINITE for row in rows]
    scores = shard_scores(rows, cosines, torn=torn, num_bytes=num_bytes, source=source)
    found = read_back(tmp_path_factory.getbasetemp(), scores)
    assert (found.source, found.num_bytes, found.torn) == (source, num_bytes, torn)
    assert found.fingerprint == FINGERPRINT
    assert found.keys == [row.key for row in rows]
    assert found.usable.tolist() == [reason is None for reason in reasons]
    np.testing.assert_array_equal(found.scores[found.usable], cosines[np.isfinite(cosines)])
    assert not found.scores[~found.usable].any()
    table = found.table.to_pydict()
    assert table["reason"] == reasons
    for name in ("index", "num_tokens", "truncated", "width", "height"):
        assert table[name] == [getattr(row, name) for row in rows]
    assert found.num_truncated == sum(row.truncated for row in rows)
    assert found.dropped == {reason: reasons.count(reason) for reason in DropReason if reason in reasons}


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(7)), st.sets(st.integers(0, 6)))
def test_rows_in_any_order_give_the_same_table_bit_for_bit(order, unusable):
    rows = [SampleRow(str(index), index, DropReason.TORN if index in unusable else None) for index in range(7)]
    cosines = {index: np.float32(index / 10) for index in range(7) if index not in unusable}
    shuffled = shard_scores([rows[index] for index in order], [cosines[i] for i in order if i in cosines])
    assert shuffled.table["index"].to_pylist() == list(range(7))
    assert {index: shuffled.scores[index] for index in cosines} == cosines
    assert written(shuffled) == written(shard_scores(rows, list(cosines.values())))


def test_equal_scores_are_written_to_equal_bytes():
    rows = [SampleRow(f"{index:09d}", index, num_tokens=5) for index in range(5000)]
    digests = {hashlib.sha256(written(shard_scores(rows))).hexdigest() for _ in range(3)}
    assert len(digests) == 1


def test_the_table_has_the_documented_columns_and_metadata(tmp_path):
    path = tmp_path / "0.parquet"
    path.write_bytes(written(shard_scores([SampleRow("a", 0), SampleRow("b", 1, DropReason.TORN)], torn=True)))
    table = pq.read_table(path)
    assert {field.name: field.type for field in table.schema} == COLUMNS
    assert list(table.schema.names) == list(COLUMNS)
    metadata = json.loads(table.schema.metadata[b"clipfilter_wds"])
    assert metadata["shard"] == "/data/0.tar"
    assert (metadata["num_bytes"], metadata["num_samples"], metadata["torn"]) == (10_240, 2, True)
    assert metadata["fingerprint"] == FINGERPRINT
    assert table["reason"].to_pylist() == [None, "torn"]


def test_a_shard_without_samples_has_an_empty_table(tmp_path):
    found = read_back(tmp_path, shard_scores([]))
    assert (found.table.num_rows, found.keys, found.dropped, found.num_truncated) == (0, [], {}, 0)
    assert found.scores.shape == found.usable.shape == (0,)


@pytest.mark.parametrize("num_scores", [0, 1, 3])
def test_scores_that_do_not_fit_the_rows_are_refused(num_scores):
    with pytest.raises(ValueError, match=r"assign|size|scores"):
        shard_scores([SampleRow("a", 0), SampleRow("b", 1), SampleRow("c", 2, DropReason.TORN)], [0.5] * num_scores)


def test_scores_of_low_precision_are_kept_as_float32(tmp_path):
    cosines = np.array([0.1, 0.25, 1.0000001], dtype=np.float32)
    found = read_back(tmp_path, shard_scores([SampleRow(str(i), i) for i in range(3)], cosines))
    assert found.scores.dtype == np.float32
    assert found.scores.tobytes() == cosines.tobytes()


# --- files that are no score table ---


def plain_parquet(**metadata) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), file)
    return file.getvalue()


WHOLE = written(shard_scores([SampleRow(str(index), index) for index in range(50)]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"key,score\n0,0.5\n",
        b"PAR1",
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-1],
        b"PAR1" + bytes(100) + b"PAR1",
        plain_parquet(),
        plain_parquet(clipfilter_wds=b"no json"),
        plain_parquet(clipfilter_wds=b"[]"),
        plain_parquet(clipfilter_wds=b"{}"),
        plain_parquet(clipfilter_wds=b'{"version": 1}'),
    ],
    ids=["empty", "csv", "magic", "half", "cut", "zeros", "other", "no json", "list", "no version", "no fields"],
)
def test_a_file_that_is_no_score_table_is_refused_with_its_name(tmp_path, data):
    path = tmp_path / "0.parquet"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"0\.parquet' is not a score table of clipfilter-wds"):
        ShardScores.read(path)


def test_a_table_of_another_version_is_refused_with_both_versions(tmp_path):
    metadata = {"version": 99, "shard": "", "num_bytes": 0, "torn": False, "fingerprint": {}}
    path = tmp_path / "0.parquet"
    path.write_bytes(plain_parquet(clipfilter_wds=json.dumps(metadata).encode()))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        ShardScores.read(path)


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_damaged_table_is_refused_or_read_and_never_another_exception(tmp_path_factory, share, mask):
    data = bytearray(WHOLE)
    data[int(share * len(data))] ^= mask
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    path.write_bytes(data)
    try:
        found = ShardScores.read(path)
    except ValueError:
        return
    assert found.table.num_rows == 50


# --- fingerprints ---


def check(found: dict, expected: dict) -> str | None:
    """What a comparison says, None where it says nothing."""
    try:
        check_fingerprint(found, expected, "'0.parquet'")
    except ValueError as error:
        return str(error)
    return None


def test_an_equal_fingerprint_is_accepted_also_after_a_trip_through_json():
    assert check(json.loads(json.dumps(FINGERPRINT)), FINGERPRINT) is None


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("resize", 224, "resize 224 there, 32 here"),
        ("crop", [32, 31], r"crop [32, 31] there, [32, 32] here"),
        ("mean", [0.5, 0.5], "mean [0.5, 0.5] there, [0.5, 0.25] here"),
        ("nested", {"a": 2}, 'nested {"a": 2} there, {"a": 1} here'),
        ("resize", None, "resize null there, 32 here"),
        ("new", "x", "new x there, null here"),
        ("weights", "1" * 64, "weights 111111111111… there, 000000000000… here"),
    ],
)
def test_a_difference_is_refused_with_both_values(name, value, shown):
    message = check({**FINGERPRINT, name: value}, FINGERPRINT)
    assert message == f"'0.parquet' was made with other settings ({shown})"


def test_all_differences_are_named():
    message = check({**FINGERPRINT, "resize": 1, "mean": 2}, FINGERPRINT)
    assert "resize 1 there, 32 here; mean 2 there" in message


@pytest.mark.parametrize("name", FINGERPRINT)
def test_a_missing_entry_is_a_difference(name):
    rest = {key: value for key, value in FINGERPRINT.items() if key != name}
    assert (check(rest, FINGERPRINT) is None) == (check(FINGERPRINT, rest) is None) == (name == "model")


def test_the_same_weights_under_another_name_are_accepted():
    assert check({**FINGERPRINT, "model": "/copied/model"}, FINGERPRINT) is None


def test_other_weights_name_both_models():
    message = check({**FINGERPRINT, "model": "other", "weights": "1" * 64}, FINGERPRINT)
    assert "model other there, m here; weights 1111" in message


# --- the tables of a folder ---


def write_tables(folder, urls, **changes) -> None:
    """A table per shard, named as `score` names them; its only sample has the shard's URL as key."""
    for url, name in output_names(urls).items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        changes = {"source": public_url(url), "num_bytes": -1, **changes}
        path.write_bytes(written(shard_scores([SampleRow(url, 0)], **changes)))


def found_key(table: ScoreFolder, url: str) -> str:
    """Which shard the table is of that is found for a shard."""
    return table.read(url).keys[0]


@pytest.mark.parametrize("inner", ["", "_scores"])
def test_each_shard_has_its_table_whether_scored_or_rewritten(tmp_path, inner):
    urls = ["data/00000.tar", "data/00001.tar.gz", "s3://bucket/key/00002.tar?version=1", "pipe:cat /data/00003.tar"]
    write_tables(tmp_path / inner, urls)
    for folder in (tmp_path, str(tmp_path / inner)):
        table = ScoreFolder(folder)
        assert [found_key(table, url) for url in urls] == urls
        assert table.fingerprint == FINGERPRINT
        assert table.lacking(["data/9.tar", *urls, "x/8.tar"]) == ["data/9.tar", "x/8.tar"]


def test_shards_of_one_base_name_have_tables_of_their_own(tmp_path):
    urls = [f"/data/{part}/0.tar" for part in ("a", "b", "b/a", "c/b")]
    write_tables(tmp_path, urls)
    table = ScoreFolder(tmp_path)
    assert [found_key(table, url) for url in urls] == urls


@pytest.mark.parametrize("where", ["/mnt/copy", "s3://bucket/data", "https://host/x"])
def test_shards_that_moved_are_found_by_their_folders_and_names(tmp_path, where):
    write_tables(tmp_path, [f"/data/{name}.tar" for name in ("0", "a/0", "b/0", "b/a/0")])
    table = ScoreFolder(tmp_path)
    for name in ("0", "a/0", "b/0", "b/a/0"):
        assert found_key(table, f"{where}/{name}.tar") == f"/data/{name}.tar"
    assert table.lacking([f"{where}/b/1.tar"]) == [f"{where}/b/1.tar"]


def test_the_shard_itself_goes_before_one_of_its_name(tmp_path):
    write_tables(tmp_path, ["/data/0.tar", "/data/a/0.tar"])
    write_tables(tmp_path / "b", ["/new/a/0.tar"])
    table = ScoreFolder(tmp_path)
    assert found_key(table, "/new/a/0.tar") == "/new/a/0.tar"
    assert found_key(table, "/other/a/0.tar") == "/data/a/0.tar"


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no score table in .*clipfilter-wds score"):
        ScoreFolder(tmp_path)


def test_a_shard_without_a_table_is_named_with_the_cure(tmp_path):
    write_tables(tmp_path, ["/data/0.tar"])
    with pytest.raises(ShardError, match=r"no score table of it in .*score it first"):
        ScoreFolder(tmp_path).read("/data/1.tar")


def test_a_shard_of_another_size_is_refused_with_both_sizes(tmp_path):
    shard = tmp_path / "0.tar"
    shard.write_bytes(bytes(10))
    write_tables(tmp_path / "scores", [str(shard)], num_bytes=10)
    table = ScoreFolder(tmp_path / "scores")
    assert found_key(table, str(shard)) == str(shard)
    shard.write_bytes(bytes(11))
    with pytest.raises(ShardError, match="11 bytes here, 10 in"):
        table.read(str(shard))


def test_tables_of_different_fingerprints_are_refused_with_both_values(tmp_path):
    write_tables(tmp_path, ["/data/0.tar"])
    write_tables(tmp_path, ["/data/1.tar"], fingerprint={**FINGERPRINT, "model": "copy"})
    ScoreFolder(tmp_path)
    write_tables(tmp_path, ["/data/2.tar"], fingerprint={**FINGERPRINT, "resize": 64})
    with pytest.raises(ValueError, match=r"2\.parquet' does not go .*resize 64 there, 32 here"):
        ScoreFolder(tmp_path)


@pytest.mark.parametrize("data", [b"", b"PAR1", plain_parquet(), plain_parquet(clipfilter_wds=b'{"version": 1}')])
def test_a_file_among_the_tables_that_is_none_is_refused(tmp_path, data):
    write_tables(tmp_path, ["/data/0.tar"])
    (tmp_path / "1.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"1\.parquet' is not a score table of clipfilter-wds"):
        ScoreFolder(tmp_path)
