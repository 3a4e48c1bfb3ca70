"""What a run says when it is done."""

import json
import re

import pytest

from tests.support.outputs import rewrite
from tests.support.toys import pair, write_shard


@pytest.mark.parametrize("options", [(), ("--samples_per_shard", "10")], ids=["copied", "packed"])
def test_torn_shards_are_named_again_when_the_run_is_resumed(command, clip_folder, tmp_path, options):
    for number in range(8):
        path = write_shard(tmp_path / "in" / f"{number}.tar", [pair(i) for i in range(2)])
        if number != 3:
            path.write_bytes(path.read_bytes()[: path.read_bytes().rindex(b"ustar")])
    torn = [f"{tmp_path}/in/{number}.tar" for number in range(8) if number != 3]
    for _ in range(2):
        code, said = rewrite(command, clip_folder, f"{tmp_path}/in/*.tar", tmp_path / "out", *options)
        [line] = re.findall(r"^torn .*$", said, re.MULTILINE)
        assert (code, line) == (0, f"torn {', '.join(torn[:5])} and 2 more")
    assert json.loads((tmp_path / "out/summary.json").read_bytes())["torn_names"] == torn
