from pathlib import Path

import pytest

from clipfilter_wds.storage.paths import any_path


def test_the_web_is_no_place_to_write_to():
    with pytest.raises(ValueError, match="can be read but not written to"):
        any_path("https://user:secret@host/out")
    with pytest.raises(ValueError, match="output is empty; it must be a path"):
        any_path("")


def test_an_output_is_local_unless_it_has_a_scheme(tmp_path):
    assert any_path(str(tmp_path)) == any_path(f"file://{tmp_path}") == tmp_path
    assert isinstance(any_path("~/x"), Path)
    assert any_path("~/x") == Path.home() / "x"
