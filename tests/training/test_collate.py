from collections import namedtuple

import numpy as np
import pytest
import torch

from clipfilter_wds.training.collate import ColumnReader, collate

Views = namedtuple("Views", "left right")


def plain(column):
    """Tensors as lists."""
    if isinstance(column, dict):
        return {name: plain(part) for name, part in column.items()}
    if isinstance(column, tuple):
        return type(column)(*map(plain, column)) if hasattr(column, "_fields") else tuple(map(plain, column))
    return column.tolist() if isinstance(column, torch.Tensor) else column


@pytest.mark.parametrize(
    ("view", "column"),
    [
        (lambda row: row, [0, 1, 2]),
        (str, ["0", "1", "2"]),
        (lambda row: [row, -row], ([0, 1, 2], [0, -1, -2])),
        (lambda row: (row, str(row)), ([0, 1, 2], ["0", "1", "2"])),
        (lambda row: [row, row, row], ([0, 1, 2],) * 3),  # as many parts as rows
        (lambda row: Views(row, [row]), Views([0, 1, 2], ([0, 1, 2],))),
        (lambda row: {"ids": [row, row], "text": str(row)}, {"ids": ([0, 1, 2],) * 2, "text": ["0", "1", "2"]}),
        (lambda row: (), ()),
    ],
)
def test_parts_of_views_become_columns_of_a_tuple(view, column):
    made = collate([view(row) for row in range(3)])
    assert plain(made) == column
    assert type(made) is type(column) or isinstance(made, torch.Tensor)


def test_of_no_views_there_is_a_column_without_rows():
    assert collate([]) == []


# --- of other loaders ---


@pytest.mark.parametrize(
    "column",
    [torch.arange(4), np.arange(4), list("abcd"), [{"a": 1}] * 4, [torch.zeros(2)] * 4, {"a": {"b": torch.arange(4)}}],
)
def test_columns_of_rows_stay_as_they_are(column):
    read = ColumnReader().read({"column": column}, 4)["column"]
    assert type(read) is type(column)
    assert str(read) == str(column)


def test_lists_of_columns_as_torch_collates_them_are_told_from_lists_of_rows():
    reader, crops = ColumnReader(), [torch.arange(3), torch.arange(3)]
    assert plain(reader.read({"crops": crops, "names": [("a", "b", "c"), ("d", "e", "f")]}, 3)) == {
        "crops": ([0, 1, 2], [0, 1, 2]),
        "names": (["a", "b", "c"], ["d", "e", "f"]),
    }
    rows = [torch.arange(2), torch.arange(2)]  # of the last batch, which has as many rows as there are crops
    assert isinstance(reader.read({"crops": rows}, 2)["crops"], tuple)
    assert isinstance(ColumnReader().read({"rows": rows}, 2)["rows"], list)


def test_a_column_of_another_length_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"a batch of 4 samples has a column 'meta\.ids' of 3 rows"):
        ColumnReader().read({"meta": {"ids": torch.arange(3)}}, 4)
    with pytest.raises(ValueError, match="a column 'words' of 2 rows"):
        ColumnReader().read({"words": ["a", "b"]}, 4)
    with pytest.raises(ValueError, match="a column 'one' of no rows"):
        ColumnReader().read({"one": torch.tensor(1)}, 4)
    with pytest.raises(TypeError, match="the column 'one' of a batch is a int; use tensors"):
        ColumnReader().read({"one": 1}, 4)
