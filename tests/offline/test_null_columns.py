"""Columns that hold nothing: what a run says of them, and that what it says helps."""

import json
import re

import pytest

from tests.support.toys import pair, write_shard

RECORD = {"matched": True, "punsafe": "0.25", "meta": {"lang": "en"}, "width": 3, "tags": ["a", "b"], "nothing": None}
FIELDS = "matched (bool), punsafe (text), meta.lang (text), width (integer), tags (list), nothing (null)"


@pytest.fixture
def shards(tmp_path):
    for number in range(2):
        samples = [{**pair(i), "json": json.dumps(RECORD).encode()} for i in range(3)]
        write_shard(tmp_path / "in" / f"{number}.tar", samples)
    return tmp_path / "in"


@pytest.fixture
def said(command, clip_folder, tmp_path):
    """Run a command into a folder of its own: the lines that it prints about columns."""

    def said(name: str, shards, *options) -> list[str]:
        model = [] if "--scores" in options else ["--model", clip_folder]
        code, text = command(
            name, shards, "--output", tmp_path / "out", *model, "--device", "cpu", "--num_workers", 0, *options
        )
        assert code == 0, text
        return re.findall(r"^column .*$", text, re.MULTILINE)

    return said


@pytest.mark.parametrize(
    ("columns", "cure"),
    [
        ("json:matchd=bool", "; did you mean json:matched=bool?"),
        ("json:matched", ". Name its type: --columns json:matched=bool"),
        ("json:punsafe", ". Name its type: --columns json:punsafe=text"),
        ("json:meta.land=text", "; did you mean json:meta.lang=text?"),
        ("json:tags=text", ""),
        ("json:zzz", ""),
        ("json:widths=integer", ""),  # every table has a column `width`
    ],
)
@pytest.mark.parametrize("command_name", ["score", "rewrite"])
def test_a_column_that_is_null_throughout_is_named_with_the_fields_that_there_are(
    said, shards, command_name, columns, cure
):
    name = re.match("json:([^=]+)", columns)[1]
    expected = f"column '{name}' is null in all 6 samples. The fields of the first json member are {FIELDS}{cure}"
    assert said(command_name, shards, "--columns", columns) == [expected]
    assert said(command_name, shards, "--columns", columns) == [expected], "again where all was done before"
    if option := re.search(r"json:\S+?(?=\?|$)", cure):
        assert said(command_name, shards, "--columns", option[0], "--overwrite") == []


def test_one_that_holds_something_anywhere_is_not_told_of(said, tmp_path, shards):
    write_shard(tmp_path / "in" / "2.tar", [{**pair(9), "json": b'{"rare": 1}'}, pair(10)])
    assert said("score", shards, "--columns", "json:rare,json:matched=bool") == []


def test_shards_without_json_members_are_told_to_have_none(said, tmp_path):
    write_shard(tmp_path / "in" / "0.tar", [pair(i) for i in range(3)])
    [line] = said("score", tmp_path / "in", "--columns", "json:a")
    assert line == "column 'a' is null in all 3 samples. The first samples have no json member with fields"


def test_from_scores_only_those_that_choose_are_told_of(said, command, clip_folder, shards, tmp_path):
    columns = "json:matchd,json:other"
    command("score", shards, "-o", tmp_path / "s", "--model", clip_folder, "--columns", columns, "--num_workers", 0)
    [line] = said("rewrite", shards, "--scores", tmp_path / "s", "--where", "matchd >= 1")
    assert line.startswith("column 'matchd' is null in all 6 samples.")
