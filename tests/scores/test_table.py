import hashlib
import json
import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.scores.table import ShardScores, read_metadata
from clipfilter_wds.types import DropReason, SampleRow
from tests.support.score_tables import FINGERPRINT, plain_parquet, shard_scores, written

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


@settings(max_examples=100)
@given(row_lists, st.data(), st.booleans(), st.integers(-1, 2**40), st.text())
def test_a_table_reads_as_it_was_written(tmp_path_factory, rows, data, torn, num_bytes, source):
    drawn = {row.index: data.draw(floats) for row in rows if row.reason is None}
    cosines = np.array(list(drawn.values()), dtype=np.float32)
    reasons = [row.reason if math.isfinite(drawn.get(row.index, 0.0)) else DropReason.NOT_FINITE for row in rows]
    scores = shard_scores(rows, cosines, torn=torn, num_bytes=num_bytes, shard=source)
    found = read_back(tmp_path_factory.getbasetemp(), scores)
    says = found.metadata
    assert (says.shard, says.num_bytes, says.torn) == (source, num_bytes, torn)
    assert says.fingerprint == FINGERPRINT
    assert says == scores.metadata
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


@settings(max_examples=50)
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
    assert metadata["range"] == [-1, 1]
    assert table["reason"].to_pylist() == [None, "torn"]


def test_a_table_of_before_there_were_kinds_holds_cosines(tmp_path):
    table = pq.read_table(pa.BufferReader(written(shard_scores([SampleRow("a", 0)]))))
    said = json.loads(table.schema.metadata[b"clipfilter_wds"])
    del said["range"]
    pq.write_table(table.replace_schema_metadata({b"clipfilter_wds": json.dumps(said)}), tmp_path / "0.parquet")
    assert ShardScores.read(tmp_path / "0.parquet").metadata.kind == COSINES


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


# --- tables that other programs have written again ---


def rewritten(tmp_path, change) -> Path:
    rows = [SampleRow(f"é{index}", index, DropReason.TORN if index == 3 else None) for index in range(5)]
    (tmp_path / "0.parquet").write_bytes(written(shard_scores(rows, [0.1, 0.25, 0.3, 0.7])))
    table = pq.read_table(tmp_path / "0.parquet")
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), tmp_path / "0.parquet")
    return tmp_path / "0.parquet"


def with_type(name: str, kind: pa.DataType):
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        column = table[name].dictionary_encode() if pa.types.is_dictionary(kind) else table[name].cast(kind)
        return table.set_column(place, name, column)

    return change


@pytest.mark.parametrize(
    "change",
    [
        with_type("key", pa.large_string()),
        with_type("index", pa.int64()),
        with_type("score", pa.float64()),
        with_type("reason", pa.dictionary(pa.int32(), pa.string())),
        with_type("uid", pa.binary()),
        lambda table: table.set_column(8, "uid", pa.nulls(table.num_rows)),
        lambda table: pa.Table.from_pandas(table.to_pandas()),
    ],
)
def test_columns_that_came_back_in_another_type_hold_what_they_held(tmp_path, change):
    path = rewritten(tmp_path, lambda table: table)
    expected = ShardScores.read(path)
    found = ShardScores.read(rewritten(tmp_path, change))
    assert found.table.select(list(COLUMNS)).equals(expected.table)
    assert found.scores.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda table: table.sort_by([("score", "descending")]), "not in the order of the shard; sort them by index"),
        (lambda table: table.drop_columns("width"), "width"),
        (lambda table: table.set_column(2, "score", pa.nulls(table.num_rows)), "score of sample 'é0' is nan"),
        (lambda table: table.set_column(2, "score", pa.array([0.1, np.inf] * 2 + [0])), "score of sample 'é1' is inf"),
        (lambda table: table.set_column(2, "score", pa.array(["high"] * table.num_rows)), "high"),
    ],
)
def test_a_table_that_lost_its_order_its_columns_or_scores_is_refused(tmp_path, change, says):
    path = rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=rf"0\.parquet' is not a score table .*{says}"):
        ShardScores.read(path)


# --- files that are no score table ---

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


@pytest.mark.parametrize("read", [ShardScores.read, read_metadata])
def test_a_table_that_may_not_be_read_is_not_taken_for_something_else(tmp_path, monkeypatch, read):
    path = tmp_path / "0.parquet"
    path.write_bytes(WHOLE)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(pq, "read_metadata", refuse)
    with pytest.raises(ValueError, match=r"can't read the score table '.*0\.parquet': Permission denied$"):
        read(path)


@pytest.mark.parametrize("read", [ShardScores.read, read_metadata])
def test_a_folder_and_a_table_that_is_gone_are_told_apart_from_damaged_ones(tmp_path, read):
    (tmp_path / "0.parquet").mkdir()
    with pytest.raises(ValueError, match=r"0\.parquet' is a folder, not a score table$"):
        read(tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"there is no score table '.*1\.parquet'$"):
        read(tmp_path / "1.parquet")


def test_a_table_of_another_version_is_refused_with_both_versions(tmp_path):
    metadata = {"version": 99, "shard": "", "num_bytes": 0, "torn": False, "fingerprint": {}}
    path = tmp_path / "0.parquet"
    path.write_bytes(plain_parquet(clipfilter_wds=json.dumps(metadata).encode()))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        ShardScores.read(path)


@settings(max_examples=200)
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


def test_a_reason_that_is_not_known_is_refused(tmp_path):
    scores = shard_scores([SampleRow("a", 0), SampleRow("b", 1, DropReason.TORN)])
    column = scores.table.schema.get_field_index("reason")
    path = tmp_path / "0.parquet"
    with path.open("wb") as file:
        pq.write_table(
            scores.table.set_column(column, "reason", pa.array([None, "nsfw"])).replace_schema_metadata(
                scores.metadata.to_schema()
            ),
            file,
        )
    with pytest.raises(ValueError, match=r"0\.parquet' .*the reason 'nsfw', which this version knows nothing of"):
        ShardScores.read(path)


def test_a_table_from_before_members_were_told_is_read(tmp_path):
    scores = shard_scores([SampleRow("a", 0)])
    [(key, said)] = scores.metadata.to_schema().items()
    before = {name: value for name, value in json.loads(said).items() if name != "members"}
    path = tmp_path / "0.parquet"
    pq.write_table(scores.table.replace_schema_metadata({key: json.dumps(before)}), path)
    assert ShardScores.read(path).metadata == scores.metadata


def test_a_table_tells_what_the_members_are_called(tmp_path):
    scores = shard_scores([SampleRow("a", 0)], members={"jpg": 1})
    assert read_back(tmp_path, scores).metadata.members == {"jpg": 1}
