"""Commit marks: damaged ones, and files of others that are called so."""

import json

import pytest

from tests.support.outputs import bits, run
from tests.support.toys import pair, write_shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for shard in range(3):
        write_shard(folder / f"{shard:05d}.tar", [pair(100 * shard + index) for index in range(30)])
    return folder


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"samples_per_shard": 20}])
@pytest.mark.parametrize("damaged", [b"", b'{"shard": "00001'])
def test_a_damaged_mark_is_named_with_what_to_do(scorer, shards, tmp_path, damaged, options):
    run(scorer, f"{shards}/*.tar", tmp_path / "out", **options)
    before, mark = bits(tmp_path / "out"), tmp_path / "out" / "00001_stats.json"
    mark.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{mark}' is no commit mark .* delete it, and its shard is made anew"):
        run(scorer, f"{shards}/*.tar", tmp_path / "out", **options)
    mark.unlink()
    run(scorer, f"{shards}/*.tar", tmp_path / "out", **options)
    assert bits(tmp_path / "out") == before


@pytest.mark.parametrize("other", [b'{"successes": 1}', b"[]"])
def test_files_of_others_that_are_called_as_marks_are_left_alone(scorer, shards, tmp_path, other):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0_stats.json").write_bytes(other)
    assert run(scorer, f"{shards}/*.tar", tmp_path / "out")["seen"] == 90
    assert (tmp_path / "out" / "0_stats.json").read_bytes() == other
    assert json.loads((tmp_path / "out" / "sizes.json").read_bytes()).keys() <= {f"0000{i}.tar" for i in range(3)}
