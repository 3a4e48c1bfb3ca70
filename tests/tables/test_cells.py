import pickle
from decimal import Decimal
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given

from clipfilter_wds.tables.cells import caption_of, image_of
from clipfilter_wds.tables.images import SeveralImages, StoredImage
from clipfilter_wds.tables.scoring import Pair

MISSING = st.sampled_from([None, float("nan"), pd.NA, pd.NaT, "", " \n", {}, {"bytes": None, "path": None}])
PATHS = st.text(min_size=1).filter(str.strip).map(lambda text: text.replace("://", ""))


def in_lists(cells: st.SearchStrategy) -> st.SearchStrategy:
    """Any of the cells, or a list of one of them, or that in a list of one."""
    makers = st.lists(st.sampled_from([list, tuple, _array]), max_size=3)

    def wrap(cell: object, makers: list) -> object:
        for make in makers:
            cell = make([cell])
        return cell

    return st.builds(wrap, cells, makers)


def _array(cells: list) -> np.ndarray:
    array = np.empty(len(cells), dtype=object)
    array[:] = cells
    return array


@given(in_lists(PATHS.filter(str.strip)))
def test_a_path_in_any_list_of_one_is_that_path(cell):
    inner = cell
    while not isinstance(inner, str):
        (inner,) = inner
    assert image_of(cell) == inner
    assert caption_of(cell) == inner.encode("utf-8", "replace").decode()
    assert not isinstance(image_of(cell), StoredImage | SeveralImages)


@given(in_lists(MISSING | st.just([])))
def test_nothing_in_any_list_of_one_is_missing(cell):
    assert image_of(cell) is None
    assert caption_of(cell) is None


@given(st.binary(), st.none() | PATHS)
def test_bytes_are_kept_with_their_name_and_go_to_a_worker_but_not_back(data, path):
    for cell in (data, bytearray(data), memoryview(data), {"bytes": data, "path": path}, [{"bytes": data}]):
        pair = pickle.loads(pickle.dumps(Pair.of_cells(cell, "a caption")))
        assert pair.image.data == data
        assert pair.image == (path or "<bytes>" if isinstance(cell, dict) else "<bytes>")
        assert type(pickle.loads(pickle.dumps(pair.image))) is str


def test_paths_and_numbers_are_names():
    assert image_of(Path("a") / "b.jpg") == str(Path("a") / "b.jpg")
    assert image_of(7) == "7"
    assert caption_of(10**400) == "1" + 400 * "0"
    assert caption_of(Decimal("1.50")) == "1.50"
    assert caption_of(Decimal("NaN")) is None
    assert image_of({"bytes": None, "path": "a.jpg"}) == "a.jpg"


@pytest.mark.parametrize("cell", [["a.jpg", "b.jpg"], np.array(["a.jpg", "b.jpg"]), [{"path": "a.jpg"}, "b.jpg"]])
def test_several_images_are_none_of_them(cell):
    found = image_of(cell)
    assert isinstance(found, SeveralImages)
    assert found == "a.jpg, b.jpg"
    assert isinstance(pickle.loads(pickle.dumps(Pair(found, "a"))).image, SeveralImages)
