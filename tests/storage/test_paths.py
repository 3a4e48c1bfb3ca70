from pathlib import Path

import fsspec
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


def test_a_folder_without_a_name_is_refused_where_it_can_not_be_listed(s3):
    with pytest.raises(ValueError, match="write one slash behind the bucket"):
        any_path("s3://bucket//out")
    assert str(any_path("s3://bucket//")) == "s3://bucket"
    assert str(any_path("s3://bucket/a//out/")) == "s3://bucket/a//out"


@pytest.mark.parametrize("name", ["a", "/a", "b//a", "b c/ü%20#a"])
def test_what_a_folder_holds_is_found_under_its_own_url(s3, name):
    fs, folder = fsspec.filesystem("s3", use_listings_cache=False), any_path("s3://bucket")
    fs.pipe_file(f"bucket/{name}.found", b"{}")
    try:
        [found] = folder.rglob("*.found")
        assert (str(found), found.read_bytes()) == (f"s3://bucket/{name}.found", b"{}")
    finally:
        fs.rm_file(f"bucket/{name}.found")
