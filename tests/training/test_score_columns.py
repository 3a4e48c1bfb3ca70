"""Columns of score tables as columns of batches."""

import math
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from clipfilter_wds.scores.table import ShardScores
from tests.support.batches import write_mixed, write_scores
from tests.support.restore import Recipe, image_number, text_number


@pytest.fixture(scope="module")
def scored(clip_folder, tmp_path_factory) -> Recipe:
    """A loader that scores, and keeps nearly all samples."""
    return Recipe(
        clip=clip_folder,
        shards=write_mixed(tmp_path_factory.mktemp("shards")),
        dataset={"image_transform": image_number, "text_transform": text_number, "seed": 1, "shuffle": 10},
        loader={"batch_size": 5, "score_batch_size": 4, "threshold": 0.0},
    )


@pytest.fixture(scope="module")
def tabled(scored, tmp_path_factory) -> Recipe:
    """The same loader from a table."""
    return scored.from_table(write_scores(scored, tmp_path_factory.mktemp("scores")))


def with_column(folder: Path, name: str, column: pa.Array) -> Path:
    """Append a column, of as many values as are given, to the tables."""
    for path in folder.rglob("*.parquet"):
        found = ShardScores.read(path)
        with path.open("wb") as file:
            table = found.table.append_column(name, column.slice(0, found.table.num_rows))
            ShardScores(table=table, metadata=found.metadata).write(file)
    return folder


def test_batches_hold_the_columns_that_are_asked_for(tabled, tmp_path):
    folder = shutil.copytree(tabled.scores, tmp_path / "joined")
    for path in folder.rglob("*.parquet"):
        found = ShardScores.read(path)
        weights = [None if index == 1 else index / 8 for index in found.table["index"].to_pylist()]
        table = found.table.append_column("weight", pa.array(weights, pa.float64()))
        table = table.append_column("language", pa.array([f"of {key}" for key in found.keys]))
        with path.open("wb") as file:
            ShardScores(table=table, metadata=found.metadata).write(file)
    expected = {
        row["key"]: row for path in folder.rglob("*.parquet") for row in ShardScores.read(path).table.to_pylist()
    }
    for options in ({"num_workers": 0}, {"num_workers": 2, "batch_size": 3}):
        asked = ["weight", "language", "num_tokens", "truncated", "uid"]
        loader = tabled.from_table(folder).but(score_columns=asked, **options).build()
        num_rows = 0
        for batch in loader:
            rows = [expected[key] for key in batch["__key__"]]
            num_rows += len(rows)
            assert batch["weight"].dtype == torch.float32
            assert [None if math.isnan(weight) else weight for weight in batch["weight"].tolist()] == [
                row["weight"] for row in rows
            ]
            assert batch["language"] == [row["language"] for row in rows]
            assert batch["num_tokens"].tolist() == [row["num_tokens"] for row in rows]
            assert batch["truncated"].tolist() == [float(row["truncated"]) for row in rows]
            assert batch["uid"] == [row["uid"] and row["uid"].hex() for row in rows]
        assert num_rows == loader.stats.kept > 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["wieght"], "there is no column 'wieght'; the score table '.*' has key, index, score"),
        (["score"], "'score' is what batches call something else"),
    ],
)
def test_columns_that_can_not_be_given_are_refused(tabled, columns, message):
    with pytest.raises(TypeError, match=r"score_columns is 'width'; give a list, such as \['width'\]"):
        tabled.but(score_columns="width").build()
    with pytest.raises(ValueError, match=message):
        tabled.but(score_columns=columns).build()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (pa.array([2**60] * 99), float(2**60)),
        (pa.array([2**64 - 1] * 99, pa.uint64()), float(2**64)),
        (pa.array(["a"] * 99, pa.large_string()), "a"),
        (pa.array(["a"] * 99, pa.string_view()), "a"),
        (pa.array(["a"] * 99).dictionary_encode(), "a"),
        (pa.array([b"a"] * 99, pa.large_binary()), "61"),
        (pa.array([0.5] * 99, pa.float16()), 0.5),
    ],
    ids=lambda it: str(getattr(it, "type", "")),
)
def test_columns_may_be_of_any_size_of_numbers_and_texts(tabled, tmp_path, column, value):
    folder = with_column(shutil.copytree(tabled.scores, tmp_path / "joined"), "more", column)
    batch = next(iter(tabled.from_table(folder).but(score_columns=["more"]).build()))
    assert {*(batch["more"] if isinstance(value, str) else batch["more"].tolist())} == {value}


def test_a_column_that_some_tables_lack_or_that_no_batch_can_hold_is_refused(tabled, tmp_path):
    folder = with_column(shutil.copytree(tabled.scores, tmp_path / "lists"), "more", pa.array([[1]] * 99))
    with pytest.raises(ValueError, match=r"'more' of '.*' holds list<.*>, no numbers and no texts"):
        tabled.from_table(folder).but(score_columns=["more"]).build()
    some = shutil.copytree(tabled.scores, tmp_path / "some")
    last = max(some.rglob("*.parquet"))
    bytes_of_last = last.read_bytes()
    with_column(some, "more", pa.array([1] * 99))
    last.write_bytes(bytes_of_last)
    with pytest.raises(ValueError, match=rf"no column 'more'; the score table '.*{last.name}' has key, index"):
        tabled.from_table(some).but(score_columns=["more"]).build()


def test_a_column_of_tables_and_one_of_members_are_not_called_the_same(tabled):
    recipe = tabled.but_dataset(sample_transform=lambda sample: {"width": 1}).but(score_columns=["width"])
    with pytest.raises(ValueError, match="two columns 'width', of its members and of score_columns; rename one"):
        next(iter(recipe.build()))


def test_columns_take_score_tables(scored):
    with pytest.raises(ValueError, match="but there is no ScoreFolder that has them"):
        scored.but(score_columns=["width"]).build()
