"""One odd name in a folder never ends a run: its shard is done, or fails alone and is named; the others are done."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from clipfilter_wds.shards.names import public_url
from tests.support.outputs import bits
from tests.support.toys import pair, tar_members, write_shard

GOOD = ["00000.tar", "00002.tar", "00003.tar"]
MODEL = ("--model", "demo-tiny", "--device", "cpu", "--num_workers", 0)
OPTIONS = {"score": MODEL, "rewrite": (*MODEL, "--threshold", 0)}

#: Names of shards that can be read, and what their outputs are called.
READABLE = {
    "no utf-8": ("00001\udcff.tar", "00001\\udcff"),
    "backslash": ("0\\1.tar", "0\\1"),
    "chain": ("a::b.tar", "a::b"),
    "cache": ("simplecache::0.tar", "simplecache::0"),
    "scheme": ("file:0.tar", "file:0"),
    "spaces": (" 0 1 .tar", " 0 1 "),
    "line end": ("0\n1.tar", "0\n1"),
    "escape code": ("\x1b[31m.tar", "\x1b[31m"),
    "right to left": ("a\u202eb.tar", "a\u202eb"),
    "as long as outputs can be called": ("x" * 237 + ".tar", "x" * 237),
    "braces": ("{0..3}.tar", "{0..3}"),
    "glob": ("[0]*.tar", "[0]*"),
    "comma": ("0,1.tar", "0,1"),
    "list": ("@0.tar", "@0"),
    "option": ("--output.tar", "--output"),
    "home": ("~0.tar", "~0"),
    "percent": ("%2e%2e.tar", "%2e%2e"),
    "markup": ("[red]0.tar", "[red]0"),
}

#: What fails: how it is made, and what is said of it.
UNREADABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "link to itself": ("l.tar", lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "link to nothing": ("d.tar", lambda path: path.symlink_to("gone"), "there is no such file"),
    "folder": ("f.tar", Path.mkdir, "Is a directory"),
    "named pipe": ("p.tar", os.mkfifo, "it is no file but a named pipe"),
    "nothing but a suffix": (".tar", lambda path: write_shard(path, [pair(0)]), "has no base name"),
    "too long": ("x" * 238 + ".tar", lambda path: write_shard(path, [pair(0)]), "give it one of 237 at most"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, name in enumerate(GOOD):
        write_shard(tmp_path / "in" / name, [pair(10 * number + i) for i in range(2)])
    return tmp_path / "in"


def spelled(folder: Path, how: str, tmp_path: Path) -> list[object]:
    """The shards of a folder as a pattern, as a shell spreads that, or as a list in a file."""
    paths = sorted(map(str, folder.iterdir()))
    if how == "glob":
        return [f"{folder}/*.tar"]
    if how == "spread":
        return paths
    (tmp_path / "list.txt").write_bytes(b"\n".join(map(os.fsencode, paths)))
    return [f"@{tmp_path}/list.txt"]


def run(command, name: str, shards: list, output: Path) -> tuple[int, str, dict]:
    code, out = command(name, *OPTIONS[name], "--output", output, *shards)
    return code, out, json.loads((output / "summary.json").read_bytes())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("how", ["glob", "spread"])
def test_shards_of_odd_names_are_done(command, folder, tmp_path, name, how):
    for number, (odd, _) in enumerate(READABLE.values(), start=10):
        write_shard(folder / odd, [pair(10 * number)])
    shards = spelled(folder, how, tmp_path)
    code, _, summary = run(command, name, shards, tmp_path / "out")
    num_shards = len(GOOD) + len(READABLE)
    assert (code, summary["shards"], summary["failed_shards"]) == (0, num_shards, {})
    assert summary["seen"] == summary["kept"] == 2 * len(GOOD) + len(READABLE)
    tables = tmp_path / "out" / ("_scores" if name == "rewrite" else "")
    for odd, called in READABLE.values():
        assert (tables / f"{called}.parquet").is_file()
        if name == "rewrite":
            assert tar_members(tmp_path / "out" / f"{called}.tar") == tar_members(folder / odd)
            mark = json.loads((tmp_path / "out" / f"{called}_stats.json").read_bytes())
            assert mark["source"] == public_url(str(folder / odd))
    before = bits(tmp_path / "out")
    code, _, summary = run(command, name, shards, tmp_path / "out")
    assert (code, summary["resumed_shards"]) == (0, num_shards)
    assert bits(tmp_path / "out") == before


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("how", ["glob", "spread", "list"])
def test_what_can_not_be_done_fails_alone_and_is_named(command, folder, tmp_path, name, how):
    for odd, make, _ in UNREADABLE.values():
        make(folder / odd)
    shards = spelled(folder, how, tmp_path)
    for resumed in (0, len(GOOD)):
        code, out, summary = run(command, name, shards, tmp_path / "out")
        assert (code, summary["shards"], summary["resumed_shards"]) == (1, len(GOOD) + len(UNREADABLE), resumed)
        assert (summary["seen"], summary["kept"]) == (2 * len(GOOD), 2 * len(GOOD))
        failed = summary["failed_shards"]
        assert set(failed) == {str(folder / odd) for odd, _, _ in UNREADABLE.values()}
        for odd, _, says in UNREADABLE.values():
            assert says in failed[str(folder / odd)]
            assert re.search(rf"failed .*/{re.escape(odd)}: .*{says}", out)


@pytest.mark.parametrize("name", OPTIONS)
def test_where_no_shard_at_all_can_have_an_output_the_arguments_are_wrong(command, tmp_path, name):
    write_shard(tmp_path / ".tar", [pair(0)])
    code, said = command(name, *OPTIONS[name], "--output", tmp_path / "out", tmp_path / ".tar")
    assert (code, "no base name" in said, (tmp_path / "out").exists()) == (2, True, False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_shard_that_may_not_be_read_fails_alone(command, folder, tmp_path, name):
    (folder / GOOD[1]).chmod(0)
    write_shard(tmp_path / "locked" / "9.tar", [pair(1)])
    (tmp_path / "locked").chmod(0)
    try:
        code, _, summary = run(command, name, [f"{folder}/*.tar", tmp_path / "locked" / "9.tar"], tmp_path / "out")
        listed = command(name, *OPTIONS[name], "--output", tmp_path / "o", f"{tmp_path}/*/*.tar")
    finally:
        (tmp_path / "locked").chmod(0o700)
    assert (code, summary["kept"]) == (1, 4)
    assert set(summary["failed_shards"].values()) == {"can't open it: Permission denied"}
    assert listed[0] == 2
    assert f"can't list '{tmp_path}/locked': Permission denied" in listed[1]


def test_a_report_of_such_a_run_shows_the_shards_that_were_done(command, folder, tmp_path):
    for odd, _ in READABLE.values():
        write_shard(folder / odd, [pair(1)])
    for odd, make, _ in UNREADABLE.values():
        make(folder / odd)
    code, _, _ = run(command, "rewrite", [f"{folder}/*.tar", "--report", tmp_path / "page.html"], tmp_path / "out")
    assert code == 1
    assert "00001\\\\udcff" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("options", [("--threshold", 0), ("--samples_per_shard", 4), ("--keep_fraction", 1)])
def test_scores_of_such_a_run_are_found_again(command, folder, tmp_path, options):
    for odd, _ in READABLE.values():
        write_shard(folder / odd, [pair(1)])
    for odd, make, _ in UNREADABLE.values():
        make(folder / odd)
    run(command, "score", [f"{folder}/*.tar"], tmp_path / "scores")
    given = (f"{folder}/*.tar", "--scores", tmp_path / "scores", "--output", tmp_path / "out", "--num_workers", 0)
    code, _ = command("rewrite", *given, *options)
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert (code, len(summary["failed_shards"])) == (1, len(UNREADABLE))
    assert summary["seen"] == 2 * len(GOOD) + len(READABLE)


def test_folders_of_odd_names_keep_shards_of_one_name_apart(command, folder, tmp_path):
    for number, odd in enumerate(("a\udcff", "b::c", "d\\e")):
        write_shard(folder / odd / "0.tar", [pair(number)])
    code, _, summary = run(command, "rewrite", [f"{folder}/*/0.tar"], tmp_path / "out")
    assert (code, summary["kept"]) == (0, 3)
    assert {str(tar.relative_to(tmp_path / "out")) for tar in (tmp_path / "out").rglob("*.tar")} == {
        "a\\udcff/0.tar",
        "b::c/0.tar",
        "d\\e/0.tar",
    }
