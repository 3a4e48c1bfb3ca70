from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipfilter_wds.training.rebatch import Rebatcher, take


def piece(numbers):
    """Columns of every kind, of which each row tells its number."""
    return {
        "tensor": torch.tensor(numbers, dtype=torch.int64),
        "list": [str(number) for number in numbers],
        "texts": tuple(str(number) for number in numbers),
        "array": np.array(numbers, dtype=np.int64),
        "nested": {"pair": (torch.tensor(numbers, dtype=torch.float64).view(-1, 1), list(numbers))},
    }


def numbers_of(batch):
    """The rows' numbers, the same in every column."""
    numbers = batch["tensor"].tolist()
    assert batch["list"] == [str(number) for number in numbers]
    assert list(batch["texts"]) == batch["list"]
    assert batch["array"].tolist() == numbers
    matrix, plain = batch["nested"]["pair"]
    assert matrix.shape == (len(numbers), 1)
    assert matrix.flatten().tolist() == plain == numbers
    return numbers


def pieces_of(sizes):
    first = 0
    for size in sizes:
        yield list(range(first, first + size))
        first += size


@given(masks=st.lists(st.lists(st.booleans(), max_size=9), max_size=12), batch_size=st.integers(1, 12))
def test_of_each_piece_only_the_rows_that_are_named_are_packed(masks, batch_size):
    rebatcher, wanted, found = Rebatcher(batch_size), [], []
    for numbers, mask in zip(pieces_of(map(len, masks)), masks, strict=True):
        rows = np.flatnonzero(mask)
        wanted += [numbers[row] for row in rows]
        rebatcher.push(piece(numbers), rows)
    while rebatcher.num_rows:
        found += numbers_of(rebatcher.pop())
    assert found == wanted


def test_a_batch_that_is_a_run_of_one_piece_is_not_copied():
    rebatcher, columns = Rebatcher(3), piece(range(8))
    rebatcher.push(columns, np.arange(2, 8))
    assert rebatcher.pop()["tensor"].data_ptr() == columns["tensor"][2:].data_ptr()


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), batch_size=st.integers(1, 12))
def test_batches_have_one_size_and_hold_every_row_once_in_order(sizes, batch_size):
    rebatcher, batches = Rebatcher(batch_size), []
    for numbers in pieces_of(sizes):
        rebatcher.push(piece(numbers), np.arange(len(numbers)))
        while rebatcher.is_ready:
            batches.append(numbers_of(rebatcher.pop()))
    assert all(len(batch) == batch_size for batch in batches)
    if rebatcher.num_rows:
        batches.append(numbers_of(rebatcher.pop()))
    assert [number for batch in batches for number in batch] == list(range(sum(sizes)))
    assert (rebatcher.num_rows, rebatcher.num_pieces, rebatcher.num_begun) == (0, 0, 0)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), batch_size=st.integers(1, 12), data=st.data())
def test_going_on_from_the_first_unfinished_piece_gives_the_same_batches(sizes, batch_size, data):
    pieces = list(pieces_of(sizes))
    whole = Rebatcher(batch_size)
    for numbers in pieces:
        whole.push(piece(numbers), np.arange(len(numbers)))
    num_batches = data.draw(st.integers(0, sum(sizes) // batch_size))
    for _ in range(num_batches):
        whole.pop()
    again = Rebatcher(batch_size)
    skip = whole.num_begun
    for numbers in pieces[len(pieces) - whole.num_pieces :]:
        again.push(piece(numbers), np.arange(skip, len(numbers)))
        skip = 0
    assert again.num_rows == whole.num_rows
    while whole.num_rows:
        assert numbers_of(again.pop()) == numbers_of(whole.pop())


def test_rows_are_taken_by_any_indices():
    assert numbers_of(take(piece([10, 11, 12, 13]), np.array([3, 1]))) == [13, 11]


@pytest.mark.parametrize("column", [3, "text", b"bytes", {1, 2}])
def test_a_column_without_rows_is_refused_by_its_type(column):
    with pytest.raises(TypeError, match=f"a column of a batch is a {type(column).__name__}; use tensors"):
        take({"column": column}, np.array([0]))


def test_pieces_of_different_columns_are_refused_with_all_names():
    rebatcher = Rebatcher(2)
    rebatcher.push({"a": [1], "b": [1]}, np.array([0]))
    rebatcher.push({"a": [2]}, np.array([0]))
    with pytest.raises(ValueError, match=r"one batch has the columns \['a', 'b'\] and another \['a'\]"):
        rebatcher.pop()


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (
            torch.zeros(1, 3, 8),
            torch.zeros(1, 3, 9),
            r"Tensors of the shape \(3, 8\) and others Tensors of the shape \(3, 9\)",
        ),
        (np.zeros((1, 2)), np.zeros((1, 1)), r"ndarrays of the shape \(2,\) and others ndarrays of the shape \(1,\)"),
        (torch.zeros(1), ["a"], r"Tensors of the shape \(\) and others items of a list"),
        ((torch.zeros(1),), (torch.zeros(1), torch.zeros(1)), "tuples of 1 and others tuples of 2"),
        ({"a": [1]}, [1], "dicts and others items of a list"),
    ],
)
def test_rows_of_different_kinds_or_shapes_are_refused_with_their_column(one, other, said):
    rebatcher = Rebatcher(2)
    rebatcher.push({"text": {"ids": one}}, np.array([0]))
    rebatcher.push({"text": {"ids": other}}, np.array([0]))
    with pytest.raises(ValueError, match=f"some rows of a batch are {said}, which no column can hold") as error:
        rebatcher.pop()
    assert error.value.__notes__ == ["in the column 'ids'", "in the column 'text'"]


def test_a_named_tuple_keeps_its_columns():
    views = namedtuple("views", "left right")
    taken = take(views(torch.arange(4), list("abcd")), np.array([2, 3]))
    assert (taken.left.tolist(), taken.right) == ([2, 3], ["c", "d"])
    assert take((), np.array([2, 3])) == ()
