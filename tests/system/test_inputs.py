"""What the page on inputs says of members is so."""

import json
import re
from pathlib import Path

import pytest

from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.samples import IMAGE_EXTENSIONS
from tests.support.outputs import rewrite
from tests.support.toys import encoded, photo, tar_members, write_shard, write_tar

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "inputs.md").read_text()
ROW = re.compile(r"^\| (`0.+) \|(.*)\|$", re.MULTILINE)


def test_each_row_of_members_is_a_sample_that_its_options_find(command, clip_folder, tmp_path):
    rows = ROW.findall(PAGE)
    assert len(rows) == 6
    for number, (members, options) in enumerate(rows):
        record = re.search(r"`(\{.*\})`", members)
        data = (record[1] if record else json.dumps({"caption": "a cat"})).encode()
        content = {"txt": b"a cat", "json": data}
        names = re.findall(r"`(0[\w.]+)`", members)
        files = [(name, content.get(name.rpartition(".")[2], encoded(photo(number)))) for name in names]
        shard = write_tar(tmp_path / f"{number}.tar", files)
        words = re.search(r"`(.*)`", options)
        output = tmp_path / f"out{number}"
        rewrite(command, clip_folder, shard, output, *(words[1].split() if words else ()))
        assert json.loads((output / "summary.json").read_bytes())["kept"] == 1, members


def test_the_lines_that_are_shown_are_those_of_such_a_run(command, clip_folder, tmp_path):
    members = [(f"{key}.{extension}", b"") for key in range(3) for extension in ("input.jpg", "outputs.txt")]
    _, said = rewrite(command, clip_folder, write_tar(tmp_path / "0.tar", members), tmp_path / "out")
    [shown] = re.findall(r"^```\n(.* samples lack .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert said.endswith(shown)


def test_the_extensions_are_those_that_are_looked_for_in_this_order():
    [listed] = re.findall(r"first of these extensions that the sample has: (.*?)\. ", PAGE, re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", listed)) == IMAGE_EXTENSIONS


# --- text ---

MAX_BYTES = 4 << 20
UID = b'"uid": "%s"' % (b"01" * 16)
LARGE_JSON = b'{%s, "caption": "a cat"}' % UID + b" " * MAX_BYTES
MANY = json.dumps({"caption": ["a cat"] * 1001}).encode()
USABLE = {"num_tokens": 6, "truncated": False, "uid": None, "reason": None}

#: Beginnings of the page's rows, the members beside the image, options, and what the score table says.
TEXTS = [
    ("a caption that is longer than", {"txt": b"cat " * 80}, [], {"num_tokens": 242, "truncated": True}),
    ("a caption of more than 65,536", {"txt": b"x" * 70_000}, [], {"num_tokens": 65_538, "truncated": True}),
    ("a caption of more than 4 MiB", {"txt": b"a cat" + b" " * MAX_BYTES + b"a dog"}, [], USABLE),
    ("a json of more than 4 MiB with", {"json": LARGE_JSON}, ["--caption", "json:caption"], "text_too_large"),
    ("a json of more than 4 MiB beside", {"json": LARGE_JSON, "txt": b"a cat"}, [], USABLE),
    ("a json field with more than", {"json": MANY}, ["--caption", "json:caption"], "text_too_large"),
    ("a json that is none", {"json": b"[1"}, ["--caption", "json:caption"], "missing_caption"),
    ("a json that is none, or without", {"json": b"{}"}, ["--caption", "json:caption"], "missing_caption"),
]


@pytest.mark.parametrize(("row", "members", "options", "said"), TEXTS, ids=[text[0] for text in TEXTS])
def test_text_becomes_what_its_row_says_and_is_copied_whole(
    command, clip_folder, tmp_path, row, members, options, said
):
    assert f"\n| {row}" in PAGE
    expected = said if isinstance(said, dict) else {"reason": said, "num_tokens": 0}
    shard = write_shard(tmp_path / "0.tar", [{"jpg": encoded(photo(1)), **members}])
    rewrite(command, clip_folder, shard, tmp_path / "out", *options)
    [found] = ShardScores.read(tmp_path / "out" / "_scores" / "0.parquet").table.to_pylist()
    assert {name: found[name] for name in expected} == expected
    if isinstance(said, dict):
        assert tar_members(tmp_path / "out" / "0.tar") == tar_members(shard)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_and_json_may_have_these_encodings(command, clip_folder, tmp_path, encoding):
    members = {"txt": "a cat".encode(encoding), "json": f"{{{UID.decode()}}}".encode(encoding)}
    shard = write_shard(tmp_path / "0.tar", [{"jpg": encoded(photo(1)), **members}])
    rewrite(command, clip_folder, shard, tmp_path / "out")
    [found] = ShardScores.read(tmp_path / "out" / "_scores" / "0.parquet").table.to_pylist()
    assert (found["num_tokens"], found["uid"]) == (6, bytes.fromhex("01" * 16))
