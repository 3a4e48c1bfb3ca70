"""What cells of a DataFrame may hold for an image."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clipfilter_wds.tables.operator import ImageClipFilter
from tests.support.dataflow import run_operator
from tests.support.toys import encoded, photo

#: path, bytes -> cell
FORMS = {
    "hugging face": lambda path, data: {"bytes": data, "path": None},
    "hugging face, path": lambda path, data: {"bytes": None, "path": path},
    "bytes": lambda path, data: data,
    "list": lambda path, data: [path],
    "list of bytes": lambda path, data: [data],
    "array": lambda path, data: np.array([path], dtype=object),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for number in range(70):
        path = folder / f"{number}.jpg"
        path.write_bytes(encoded(photo(number)))
        rows.append({"image": str(path), "caption": f"photo number {number}", "n": number})
    return pd.DataFrame(rows)


def kept(operator: ImageClipFilter, table: pd.DataFrame) -> pd.DataFrame:
    return run_operator(operator, table, threshold=0.01)[1]


@pytest.mark.parametrize("form", FORMS)
def test_images_of_any_form_score_as_their_paths_do(operator, table, form):
    cells = [FORMS[form](path, Path(path).read_bytes()) for path in table.image]
    expected = kept(operator, table)
    found = kept(operator, table.assign(image=pd.Series(cells, dtype=object)))
    assert 0 < len(expected) < len(table)
    assert found.n.tolist() == expected.n.tolist()


def test_a_row_of_several_images_scores_zero_and_the_log_says_so(operator, table, caplog):
    images = [[path, path] if number % 2 else path for number, path in enumerate(table.image)]
    with caplog.at_level(logging.WARNING):
        found = kept(operator, table.assign(image=images))
    assert found.n.tolist() == [number for number in kept(operator, table).n if number % 2 == 0]
    assert "several_images: 35, the first in row 1 (image " in caplog.text
