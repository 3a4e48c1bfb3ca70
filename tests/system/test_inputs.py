"""What the page on inputs says of members is so."""

import json
import re
from pathlib import Path

from clipfilter_wds.shards.samples import IMAGE_EXTENSIONS
from tests.support.outputs import rewrite
from tests.support.toys import encoded, photo, write_tar

DOCS = Path(__file__).parents[2] / "docs"
PAGE = next(path.read_text() for path in (DOCS / "inputs_c.md", DOCS / "inputs.md") if path.is_file())
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
