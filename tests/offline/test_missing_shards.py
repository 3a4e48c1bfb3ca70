"""Shards that a brace range spans and that are not there, as img2dataset leaves gaps."""

import json

import fsspec
import pytest

from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.urls import expand_shards
from tests.support.outputs import bits, rewrite
from tests.support.toys import pair, write_shard

SKIP = "--skip_missing_shards"


@pytest.fixture
def folder(tmp_path):
    """Shards 0, 3 and 9 of 10."""
    for number in (0, 3, 9):
        write_shard(tmp_path / "in" / f"{number:05d}.tar", [pair(10 * number + i) for i in range(2)])
    return tmp_path / "in"


@pytest.fixture
def memory(folder):
    """The same shards in memory."""
    fs = fsspec.filesystem("memory")
    for path in folder.iterdir():
        fs.pipe(f"/gaps/{path.name}", path.read_bytes())
    yield "memory:///gaps"
    fs.rm("/gaps", recursive=True)


def summary_of(output) -> dict:
    return json.loads((output / "summary.json").read_bytes())


def test_without_the_option_a_missing_shard_is_an_error_before_anything_is_done(command, clip_folder, folder, tmp_path):
    code, out = rewrite(command, clip_folder, f"{folder}/{{00000..00009}}.tar", tmp_path / "out")
    assert code == 2
    assert f"no shard matches '{folder}/00001.tar': there is no such file" in out
    assert "--skip_missing_shards leaves out what is missing" in out
    assert not (tmp_path / "out").exists()


def test_the_option_is_named_only_where_it_leaves_a_shard(command, clip_folder, folder, tmp_path):
    for shards in (f"{folder}/typo.tar", f"{folder}/{{00001..00002}}.tar"):
        code, out = rewrite(command, clip_folder, shards, tmp_path / "out")
        assert (code, "there is no such file" in out, SKIP in out) == (2, True, False)


@pytest.mark.parametrize("place", ["here", "memory"])
def test_missing_shards_are_left_out_counted_and_named(command, clip_folder, folder, memory, tmp_path, place):
    place = folder if place == "here" else memory
    shards = f"{place}/{{00000..00009}}.tar"
    code, out = rewrite(command, clip_folder, shards, tmp_path / "out", SKIP)
    summary = summary_of(tmp_path / "out")
    assert (code, summary["shards"], summary["kept"], summary["failed_shards"]) == (0, 3, 6, {})
    missing = [public_url(f"{place}/{number:05d}.tar") for number in (1, 2, 4, 5, 6, 7, 8)]
    assert summary["missing_shards"] == missing
    assert "missing and left out" in out
    assert f"missing {', '.join(missing[:5])} and 2 more; summary.json names them all" in out
    rewrite(command, clip_folder, f"{folder}/*.tar", tmp_path / "glob")
    assert [bits(tmp_path / "out")[f"{name}.tar"] for name in ("00000", "00003", "00009")] == [
        bits(tmp_path / "glob")[f"{name}.tar"] for name in ("00000", "00003", "00009")
    ]
    assert summary_of(tmp_path / "glob")["missing_shards"] == []


def test_a_shard_that_has_come_since_is_done_when_the_run_is_started_again(command, clip_folder, folder, tmp_path):
    shards = f"{folder}/{{00000..00004}}.tar"
    rewrite(command, clip_folder, shards, tmp_path / "out", SKIP)
    write_shard(folder / "00002.tar", [pair(7)])
    code, _ = rewrite(command, clip_folder, shards, tmp_path / "out", SKIP, "--report", tmp_path / "page.html")
    summary = summary_of(tmp_path / "out")
    assert (code, summary["shards"], summary["resumed_shards"], len(summary["missing_shards"])) == (0, 3, 2, 2)
    assert (tmp_path / "page.html").is_file()
    (folder / "00003.tar").unlink()
    code, _ = command("report", tmp_path / "out", "--shards", shards, "--output", tmp_path / "again.html")
    assert code == 0


def test_the_option_may_stand_in_a_yaml_file(command, clip_folder, folder, tmp_path):
    (tmp_path / "run.yaml").write_text("skip_missing_shards: true\n")
    shards = f"{folder}/{{00000..00001}}.tar"
    options = ("--model", clip_folder, "--device", "cpu", "--num_workers", 0, "--config", tmp_path / "run.yaml")
    assert command("score", shards, "--output", tmp_path / "out", *options)[0] == 0
    assert summary_of(tmp_path / "out")["missing_shards"] == [f"{folder}/00001.tar"]
    assert command("score", shards, "--output", tmp_path / "no", *options, "--no_skip_missing_shards")[0] == 2


def test_only_what_is_named_can_be_missing(folder, memory):
    there = [f"{folder}/00000.tar"]
    assert expand_shards([*there, f"{folder}/0000{{1..2}}.tar", f"{folder}/x.tar"], skip_missing=True) == there
    assert expand_shards(f"{memory}/{{00003..00005}}.tar", skip_missing=True) == [f"{memory}/00003.tar"]
    for shards, says in (
        ([*there, f"{folder}/x*.tar"], "no shard matches"),
        (f"{folder}/0000{{1..2}}.tar", "no shard matches: none of 2 is there, such as '.*00001.tar'"),
        (f"{folder}/00001.tar", "no shard matches '.*00001.tar': it is not there"),
        (f"{memory}/0000{{1..2}}.tar", "no shard matches: none of 2 is there, such as '.*00001.tar'"),
        ([*there, str(folder.parent)], "is a folder"),
    ):
        with pytest.raises(ValueError, match=says):
            expand_shards(shards, skip_missing=True)


def test_a_link_that_leads_nowhere_is_not_missing_but_broken(command, clip_folder, folder, tmp_path):
    (folder / "00001.tar").symlink_to("gone")
    code, _ = rewrite(command, clip_folder, f"{folder}/{{00000..00002}}.tar", tmp_path / "out", SKIP)
    summary = summary_of(tmp_path / "out")
    assert code == 1
    assert list(summary["failed_shards"]) == [f"{folder}/00001.tar"]
    assert summary["missing_shards"] == [f"{folder}/00002.tar"]
