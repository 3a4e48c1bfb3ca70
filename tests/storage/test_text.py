import codecs
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfilter_wds.storage.text import decode_text, read_lines

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
#: A line may hold any character but those that end it; other white space behind it does not count.
LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1).map(str.rstrip)


@given(
    lines=st.lists(LINES.filter(bool)), encoding=st.sampled_from(ENCODINGS), end=st.sampled_from(["\n", "\r\n", "\r"])
)
def test_lines_are_the_same_in_any_encoding_with_any_line_end(tmp_path_factory, lines, encoding, end):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    # A mark at the very beginning is taken for one, so a file of UTF-8 must have one if its text begins with it.
    encoding = "utf-8-sig" if encoding == "utf-8" and "".join(lines).startswith("\ufeff") else encoding
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    assert list(read_lines(path, "list")) == lines


@given(text=st.text(st.characters(exclude_categories=["Cs"])), big_endian=st.booleans())
def test_text_with_a_byte_order_mark_is_decoded_by_it(text, big_endian):
    encoding, mark = ("utf-16-be", codecs.BOM_UTF16_BE) if big_endian else ("utf-16-le", codecs.BOM_UTF16_LE)
    if big_endian or not text.startswith("\0"):  # else it is UTF-32's mark
        assert decode_text(mark + text.encode(encoding)) == text


@pytest.mark.parametrize("data", ["naïve".encode("latin-1"), codecs.BOM_UTF16_LE + b"a", b"\x80\x04\x95"])
def test_what_is_in_no_such_encoding_is_refused_with_its_name(tmp_path, data):
    (tmp_path / "keys.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"list '.*keys\.txt' is no text: .*; save it as UTF-8"):
        list(read_lines(tmp_path / "keys.txt", "list"))


@pytest.mark.parametrize("num_lines", [1, 5000])
def test_what_can_be_read_only_once_is_read_whole(num_lines):
    lines = [f"{number:05d}.tar" for number in range(num_lines)]
    with subprocess.Popen(["printf", "%s\\n", *lines], stdout=subprocess.PIPE) as process:
        assert list(read_lines(Path(f"/dev/fd/{process.stdout.fileno()}"), "list")) == lines


def test_the_home_folder_is_found_and_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.txt").write_text("a\n\n  b  \n")
    assert list(read_lines(Path("~/list.txt"), "list")) == ["a", "  b"]
    with pytest.raises(ValueError, match=r"can't read list '.*none\.txt': No such file"):
        list(read_lines(tmp_path / "none.txt", "list"))
