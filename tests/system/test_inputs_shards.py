"""What docs/inputs.md says of shards and their names."""

import gzip
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fsspec
import pytest
import zstandard

from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.training.dataset import ClipWebDataset
from tests.support.outputs import rewrite
from tests.support.toys import pair, read_whole, tar_bytes, tar_members, write_shard

PAGE = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text()
SECTION = PAGE.partition("## Shards and their names\n")[2].partition("\n## ")[0]

A, B = [f"a/00{number}.tar" for number in range(3)], [f"b/00{number}.tar" for number in range(3)]
ROWS = {
    "a/000.tar": A[:1],
    "a": A,
    "a/": A,
    "a/*.tar": A,
    "**/[01]??.tar": [*A, *B],
    "{a,b}/{000..002}.tar": [*A, *B],
    "a/000.tar,b/*.tar": [A[0], *B],
    "a/{000..001}.tar::b/*.tar": [*A[:2], *B],
    "{a/000,b/00[12]}.tar": [A[0], *B[1:]],
    "@list.txt": [A[2], *B],
    "memory://bucket/{000..001}.tar": A[:2],
    "simplecache::memory://bucket/*.tar": A,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folders that the table's patterns match: a shard holds its own name."""
    monkeypatch.chdir(tmp_path)
    for name in (*A, *B):
        write_shard(tmp_path / name, [{**pair(1), "txt": name.encode()}])
    (tmp_path / "list.txt").write_text("# comment\n\na/002.tar\nb/*.tar\n")
    fs = fsspec.filesystem("memory")
    for name in A:
        fs.pipe(f"/bucket/{name[2:]}", (tmp_path / name).read_bytes())
    yield tmp_path
    fs.rm("/bucket", recursive=True)


def test_every_row_is_tested_here():
    rows = re.findall(r"^\| (`.*?) \|", SECTION, flags=re.MULTILINE)
    assert [pattern for row in rows for pattern in re.findall("`(.+?)`", row)] == list(ROWS)


@pytest.mark.parametrize("pattern", ROWS)
def test_what_a_pattern_stands_for(here, cache, pattern):
    captions = [dict(tar_members_of(url))["000000000.txt"].decode() for url in expand_shards(pattern)]
    assert captions == ROWS[pattern]


def tar_members_of(url: str) -> list[tuple[str, bytes]]:
    Path("copy.tar").write_bytes(read_whole(url))
    return tar_members(Path("copy.tar"))


# --- the lines below the table ---

#: By its beginning in bold, what shows that a line is true.
LINES: dict[str, Callable[..., None]] = {}


def line(beginning: str) -> Callable[[Callable[..., None]], None]:
    return partial(LINES.__setitem__, beginning)


@pytest.fixture
def run(here, command, clip_folder):
    """Rewrite, keeping all: the exit code, what was said, and the summary."""

    def rewrite_all(shards, *options, output="out") -> tuple[int, str, dict]:
        code, said = rewrite(command, clip_folder, shards, here / output, *options)
        summary = here / output / "summary.json"
        return code, said, json.loads(summary.read_bytes()) if summary.exists() else {}

    return rewrite_all


@line("A file or folder that exists")
def a_file_or_folder_that_exists(run, here):
    for name in ("x,{y}[z]::.tar", os.fsdecode(b"\xff.tar")):
        write_shard(here / "odd" / name, [pair(1)])
    assert expand_shards("odd/x,{y}[z]::.tar") == ["odd/x,{y}[z]::.tar"]
    write_shard(here / "run[1],{2}" / "000.tar", [pair(1)])
    assert expand_shards("run[1],{2}") == ["run[1],{2}/000.tar"]
    code, _, summary = run("odd/*.tar")
    assert (code, summary["kept"]) == (0, 2)
    assert {path.name for path in (here / "out").glob("*.tar")} == {"x,{y}[z]::.tar", "\\udcff.tar"}


@line("A shard that is named twice")
def a_shard_that_is_named_twice(run, here):
    code, _, summary = run(f"a/*.tar,a/000.tar::{here}/a/001.tar,./a/../a/002.tar")
    assert (code, summary["shards"], summary["seen"]) == (0, 3, 3)


@line("A name before `::`")
def a_name_before(run, here):
    for refused, says in (
        ("filecache::memory://bucket/000.tar", "may deliver wrong bytes"),
        ("nosuch::memory://bucket/000.tar", "not known"),
        ("zip://000.tar::a.zip", "within an archive"),
    ):
        code, said, _ = run(refused)
        assert code == 2
        assert says in said


@line("A shell command")
def a_shell_command(run, here):
    assert run("pipe:cat a/000.tar")[0] == 2
    assert expand_shards("pipe:cat a/000.tar", allow_pipe=True) == ["pipe:cat a/000.tar"]
    assert read_whole("pipe:cat a/000.tar", allow_pipe=True) == Path("a/000.tar").read_bytes()


@line("A shard that is not there")
def a_shard_that_is_not_there(run, here):
    assert run("a/{000..009}.tar") == (2, run("a/{000..009}.tar")[1], {})
    code, said, summary = run("a/{000..009}.tar", "--skip_missing_shards")
    assert (code, summary["shards"]) == (0, 3)
    assert summary["missing_shards"] == [f"{here}/a/00{number}.tar" for number in range(3, 10)]
    assert f"missing {here}/a/003.tar" in said
    assert ClipWebDataset("a/{000..009}.tar", skip_missing_shards=True).urls == A
    code, _, summary = run("memory://bucket/{002..003}.tar", output="remote")
    assert (code, summary["failed_shards"]) == (1, {"memory://bucket/003.tar": "can't open it: there is no such file"})


@line("A pattern that matches nothing")
def a_pattern_that_matches_nothing(run, here):
    for pattern in ("c/*.tar", "a/[x].tar", ".", f"{here}/"):
        assert run(pattern)[0] == 2
    assert not (here / "out").exists()
    # A folder that may not be listed: tests/system/test_odd_names.py, which needs another user than root.


@line("A shard that can't be read")
def a_shard_that_cant_be_read(run, here):
    for make, name in ((Path.mkdir, "3.tar"), (os.mkfifo, "4.tar")):
        make(here / "a" / name)
    (here / "a" / "5.tar").symlink_to("5.tar")
    (here / "a" / "6.tar").symlink_to("gone")
    (here / "a" / "7.tar").write_bytes(b"no tar" * 1000)
    code, said, summary = run("a/*.tar")
    failed = [f"{here}/a/{number}.tar" for number in range(3, 8)]
    assert (code, summary["kept"], sorted(summary["failed_shards"])) == (1, 3, failed)
    assert all(f"failed {path}" in said for path in failed)
    (here / "a" / "7.tar").write_bytes(tar_bytes([(f"x.{ext}", data) for ext, data in pair(1).items()]))
    code, _, summary = run("a/*.tar")
    assert (code, summary["kept"], sorted(summary["failed_shards"])) == (1, 4, failed[:-1])


@line("A shard is a tar")
def a_shard_is_a_tar(run, here):
    tar = (here / "a" / "000.tar").read_bytes()
    (here / "a" / "001.tar").write_bytes(gzip.compress(tar))
    (here / "a" / "002.tar").write_bytes(zstandard.ZstdCompressor().compress(tar))
    (here / "a" / "003.tar").write_bytes(b"<html>404</html>" * 100)
    code, _, summary = run("a/*.tar")
    assert (code, summary["kept"]) == (1, 3)
    assert "a page of HTML" in summary["failed_shards"][f"{here}/a/003.tar"]


@line("Shards joined by `cat`")
def shards_joined_by_cat(run, here):
    parts = [gzip.compress((here / name).read_bytes()) for name in A]
    (here / "c.tar").write_bytes(b"".join(parts))
    code, _, summary = run("c.tar")
    assert (code, summary["kept"], summary["renamed_keys"]) == (0, 3, 2)
    names = [name for name, _ in tar_members(here / "out" / "c.tar") if name.endswith("jpg")]
    assert names == ["000000000.jpg", "000000000_1.jpg", "000000000_2.jpg"]


@line("What follows the end")
def what_follows_the_end(run, here):
    with (here / "a" / "000.tar").open("ab") as file:
        file.write(b"a signature")
    packed = gzip.compress((here / "a" / "001.tar").read_bytes())
    (here / "a" / "001.tar").write_bytes(packed + b"a signature")
    for number, torn in enumerate((0, 1)):
        code, _, summary = run(f"a/00{number}.tar", output=f"{number}")
        assert (code, summary["seen"], summary["torn_shards"]) == (0, 1, torn)


@line("A tar that is cut")
def a_tar_that_is_cut(run, here):
    whole = tar_bytes([(f"{key}.{ext}", data) for key in "xy" for ext, data in pair(1).items()])
    cut = whole.rstrip(b"\0")
    for name, data, kept in (("cut", cut, 1), ("joined", whole + cut, 3)):
        (here / f"{name}.tar").write_bytes(data)
        code, _, summary = run(f"{name}.tar", output=name)
        assert (code, summary["kept"], summary["dropped"], summary["torn_shards"]) == (0, kept, {"torn": 1}, 1)


@line("A shard that was replaced")
def a_shard_that_was_replaced(run, here):
    path, (_, _, first) = here / "a" / "000.tar", run("a/000.tar")
    os.utime(path)
    again = run("a/000.tar")[2]
    write_shard(path, [{**pair(1), "txt": b"another text"}])
    other = run("a/000.tar")[2]
    write_shard(path, [{**pair(1), "txt": b"another_text"}])
    same_headers = run("a/000.tar")[2]
    assert [summary["resumed_shards"] for summary in (first, again, other, same_headers)] == [0, 1, 0, 1]


@line("Outputs are named after the shard")
def outputs_are_named_after_the_shard(run, here):
    suffixes = (".tar", ".tgz", ".tar.gz", ".tzst", ".tar.zst")
    for number, suffix in enumerate(suffixes):
        write_shard(here / "s" / f"{number}{suffix}", [pair(1)])
    code, _, _ = run("s/*", output="suffixes")
    assert (code, len(list((here / "suffixes").glob("?.tar")))) == (0, len(suffixes))
    run("a/000.tar,b/000.tar", output="folders")
    assert sorted(path.parent.name for path in (here / "folders").rglob("000.tar")) == ["a", "b"]
    write_shard(here / "a" / "000.tar.gz", [pair(1)])
    code, said, _ = run("a/*", output="clash")
    assert (code, (here / "clash").exists()) == (2, False)
    assert "would both be written to '000.tar'; rename one of them" in said
    for size in (237, 238):
        write_shard(here / "long" / f"{'x' * size}.tar", [pair(1)])
    code, _, summary = run("long/*", output="long out")
    assert (code, summary["kept"], len(summary["failed_shards"])) == (1, 1, 1)


def test_every_line_is_tested_here():
    assert re.findall(r"^- \*\*(.+?)\*\*", SECTION, flags=re.MULTILINE) == list(LINES)


@pytest.mark.parametrize("beginning", LINES)
def test_what_a_line_says(run, here, beginning):
    LINES[beginning](run, here)
