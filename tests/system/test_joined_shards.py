"""Shards that were joined by `cat`, through commands and loaders."""

import gzip
import json
from pathlib import Path

import fsspec
import pytest

from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.stream import PartEnd, Position, StreamOrder, read_stream
from clipfilter_wds.workers.crashes import CrashTracker
from tests.support.outputs import bits, check_accounting, rewrite
from tests.support.toys import pair, tar_bytes, tar_members, write_shard

NUM_SAMPLES, NUM_SHARDS = 5, 3


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Shards whose samples are numbered from zero in each."""
    return [
        write_shard(tmp_path / f"{shard}.tar", [pair(10 * shard + i) for i in range(NUM_SAMPLES)])
        for shard in range(NUM_SHARDS)
    ]


@pytest.fixture
def joined(shards, tmp_path) -> Path:
    """What `cat` makes of them."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "c.tar"
    path.write_bytes(b"".join(shard.read_bytes() for shard in shards))
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_rewrite_sees_all_samples_of_all_of_them(command, clip_folder, shards, joined, tmp_path, packed, num_workers):
    if packed:
        joined.write_bytes(b"".join(gzip.compress(shard.read_bytes()) for shard in shards))
    options = ("--num_workers", num_workers, "--batch_size", 4)
    code, _ = rewrite(command, clip_folder, joined, tmp_path / "out", *options)
    summary = check_accounting(tmp_path / "out")
    num_samples = NUM_SHARDS * NUM_SAMPLES
    assert (code, summary["seen"], summary["kept"], summary["torn_shards"]) == (0, num_samples, num_samples, 0)
    assert tar_members(tmp_path / "out" / "c.tar") == [member for shard in shards for member in tar_members(shard)]
    scores = ShardScores.read(tmp_path / "out" / "_scores" / "c.parquet")
    assert scores.keys == [f"{key:09d}" for key in range(NUM_SAMPLES)] * NUM_SHARDS


def test_rewrite_of_a_joined_shard_that_is_kept_on_disk_is_the_same(command, clip_folder, joined, tmp_path, cache):
    fs = fsspec.filesystem("memory")
    fs.pipe("/joined/c.tar", joined.read_bytes())
    rewrite(command, clip_folder, joined, tmp_path / "out")
    rewrite(command, clip_folder, "simplecache::memory://joined/c.tar", tmp_path / "cached")
    fs.rm("/joined", recursive=True)
    assert bits(tmp_path / "out")["c.tar"] == bits(tmp_path / "cached")["c.tar"]


@pytest.mark.parametrize(("shuffle", "num_streams"), [(0, 1), (4, 1), (4, 2)])
def test_training_resumes_after_every_sample(joined, shuffle, num_streams):
    order = StreamOrder(urls=[str(joined)], shuffle=shuffle, seed=0, num_streams=num_streams)
    tracker = CrashTracker(order.urls, 0)

    def read(stream: int, start: Position) -> list:
        items = read_stream(order, stream, start, SampleLayout(), tracker.for_worker())
        return [item for item in items if not isinstance(item, PartEnd)]

    total = 0
    for stream in range(num_streams):
        whole = read(stream, Position())
        total += len(whole)
        for number, item in enumerate(whole):
            assert read(stream, item.after) == whole[number + 1 :]
    assert total == NUM_SHARDS * NUM_SAMPLES


@pytest.mark.parametrize("sources", ["{folder}/0.tar::{folder}/1.tar", "{folder}/{{0,1}}.tar::{folder}/[01].tar"])
def test_sources_that_are_joined_in_the_command_are_each_written_under_their_own_name(
    command, clip_folder, shards, sources, tmp_path
):
    code, _ = rewrite(command, clip_folder, sources.format(folder=tmp_path), tmp_path / "out")
    assert (code, check_accounting(tmp_path / "out")["seen"]) == (0, 2 * NUM_SAMPLES)
    for name in ("0.tar", "1.tar"):
        assert tar_members(tmp_path / "out" / name) == tar_members(tmp_path / name)


# --- samples of one key, between which others are dropped ---


def named(key: str, number: int, *extensions: str) -> list[tuple[str, bytes]]:
    members = {**pair(number), "json": b'{"n": %d}' % number}
    return [(f"{key}.{extension}", members[extension]) for extension in extensions]


@pytest.mark.parametrize("join", [True, False], ids=["two archives", "one archive"])
def test_samples_of_one_key_that_copying_brings_together_do_not_become_one(command, clip_folder, tmp_path, join):
    """The second begins with a member that the first lacks, so a reader would add it to the first."""
    unusable = [("b.jpg", b"no image"), ("b.txt", b"a caption")]
    first, second = named("a", 1, "jpg", "txt"), named("a", 2, "json", "jpg", "txt")
    parts = [[*first, *unusable], second, named("a_1", 3, "jpg", "txt")]
    tars = [tar_bytes(part) for part in parts] if join else [tar_bytes([member for part in parts for member in part])]
    (tmp_path / "0.tar").write_bytes(b"".join(tars))
    code, out = rewrite(command, clip_folder, tmp_path / "0.tar", tmp_path / "out")
    members = tar_members(tmp_path / "out" / "0.tar")
    assert (code, members[:2], members[5:]) == (0, first, parts[2])
    assert members[2:5] == [(name.replace("a.", "a__1."), data) for name, data in second]
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert (summary["seen"], summary["kept"], summary["renamed_keys"]) == (4, 3, 1)
    assert "keys with a suffix" in out
    code, _ = rewrite(command, clip_folder, tmp_path / "out" / "0.tar", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "summary.json").read_bytes())["kept"] == 3
