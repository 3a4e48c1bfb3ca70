import glob
import os
import string
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from clipfilter_wds.storage.local_glob import local_matches

NAMES = ["a.tar", "b.tar", "a", "b", ".c.tar", "a\n.tar", "[a].tar", "\udcff.tar", "a\\b.tar"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Files of these names, in folders of these names, two levels deep; no links."""
    folder = tmp_path_factory.mktemp("tree")
    for above in ("", "a", "b", "a/b", "[x]"):
        (folder / above).mkdir(exist_ok=True)
        for name in NAMES:
            if not (folder / above / name).is_dir() and f"{above}/{name}".lstrip("/") not in ("a", "b", "a/b"):
                (folder / above / name).write_bytes(b"")
    return folder


parts = st.sampled_from(["*", "**", "?", "a", "b", "[ab]", "[!a]", "*.tar", "a*", ".*", "none", "[[]*", "*\n*"])


@settings(max_examples=200)
@given(st.lists(parts, min_size=1, max_size=4), st.booleans())
def test_it_finds_what_the_standard_library_finds(tree, parts, is_absolute):
    pattern = "/".join(parts)
    here = Path.cwd()
    os.chdir(tree)
    try:
        expected = glob.glob(pattern, recursive=True, include_hidden=True)  # noqa: PTH207
        found = local_matches(tree / pattern if is_absolute else Path(pattern))
    finally:
        os.chdir(here)
    expected = [str(tree / path) for path in expected if path and not path.endswith("/")]
    assert files_if(parts[-1] == "**", found) == files_if(parts[-1] == "**", expected)


def files_if(only_files: bool, paths) -> set[str]:
    """Paths, without folders where asked to: what a ``**`` at the end stands for besides files is no matter here."""
    return {path for path in map(os.path.normpath, paths) if not (only_files and Path(path).is_dir())}


def test_links_that_lead_in_circles_or_nowhere(tmp_path):
    (tmp_path / "0.tar").touch()
    for name in string.ascii_lowercase:
        (tmp_path / name).symlink_to(".")
    (tmp_path / "l.tar").symlink_to("l.tar")
    (tmp_path / "gone.tar").symlink_to("gone")
    expected = [f"{tmp_path}/{name}" for name in ("0.tar", "gone.tar", "l.tar")]
    assert local_matches(tmp_path / "**" / "*.tar") == local_matches(tmp_path / "*.tar") == expected
    assert local_matches(tmp_path / "*" / "none") == []
    assert local_matches(tmp_path / "[a]" / "*.tar") == [f"{tmp_path}/a/{Path(path).name}" for path in expected]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
@pytest.mark.parametrize("pattern", ["*/*.tar", "**/*.tar", "locked/*.tar", "**"])
def test_a_folder_that_may_not_be_listed_is_an_error_that_names_it(tmp_path, pattern):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(ValueError, match=rf"can't list '{tmp_path}/locked': Permission denied"):
        local_matches(tmp_path / pattern)
