import errno
import os
from pathlib import Path

import pytest

from clipfilter_wds.scores.apart import check_apart
from clipfilter_wds.scores.folder import ScoreFolder, kind_of_scores
from clipfilter_wds.scores.table_folder import table_folder


def test_the_tables_of_a_rewrite_lie_in_a_folder_of_their_own(tmp_path):
    assert table_folder(str(tmp_path)) == tmp_path
    (tmp_path / "_scores").mkdir()
    assert table_folder(tmp_path) == tmp_path / "_scores"


@pytest.mark.parametrize(
    "find", [ScoreFolder, kind_of_scores, lambda scores: check_apart(Path("/somewhere/else"), scores)]
)
def test_a_folder_that_may_not_be_looked_into_is_named_with_the_reason(tmp_path, monkeypatch, find):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)  # the tests may run as root, who may look everywhere
    with pytest.raises(ValueError, match=f"can't look for score tables in '{tmp_path}': Permission denied$"):
        find(tmp_path)
