"""Kept samples of many shards, packed into shards of equal size."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.packing import Source, check_covered
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import ShardIdentity
from tests.support.outputs import bits, check_accounting, run
from tests.support.toys import pair, tar_members, write_shard, write_tar

SIZES = [30, 1, 0, 17, 30]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for shard, size in enumerate(SIZES):
        samples = [{**pair(100 * shard + i), "json": b'{"i": %d}' % i, "seg.npy": bytes([i])} for i in range(size)]
        if size > 20:
            samples[7] = {"jpg": b"no image", "txt": b"a caption"}
        write_shard(folder / f"{shard:05d}.tar", samples, start=1000 * shard)
    whole = (folder / "00004.tar").read_bytes()
    (folder / "00004.tar").write_bytes(whole[: len(whole) // 2])  # torn
    return folder


@pytest.fixture(scope="module")
def scores(scorer, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    process_shards(ScoreConfig(shards=f"{shards}/*.tar", output=folder, batch_size=8, num_workers=0), scorer)
    return folder


def pack(shards, output, scores, samples_per_shard, **options) -> dict:
    options = {"threshold": 0.12, "num_workers": 0, **options}
    config = RewriteConfig(
        shards=f"{shards}/*.tar", output=output, scores=scores, samples_per_shard=samples_per_shard, **options
    )
    process_shards(config)
    return check_accounting(output)


def all_members(folder) -> list[tuple[str, bytes]]:
    return [member for path in sorted(folder.glob("*.tar")) for member in tar_members(path)]


def keys_of(path) -> list[str]:
    return [name.removesuffix(".jpg") for name, _ in tar_members(path) if name.endswith(".jpg")]


@pytest.fixture(scope="module")
def unpacked(shards, scores, tmp_path_factory):
    """The same samples, a shard for each input shard."""
    folder = tmp_path_factory.mktemp("unpacked")
    config = RewriteConfig(shards=f"{shards}/*.tar", output=folder, scores=scores, threshold=0.12, num_workers=0)
    process_shards(config)
    return folder


@pytest.mark.parametrize("samples_per_shard", [1, 7, 10, 1000])
def test_the_same_samples_in_the_same_order_fill_all_shards_but_the_last(
    shards, scores, unpacked, tmp_path, samples_per_shard
):
    summary = pack(shards, tmp_path / "out", scores, samples_per_shard)
    assert all_members(tmp_path / "out") == all_members(unpacked)
    *full, last = [len(keys_of(path)) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert set(full) <= {samples_per_shard}
    assert 0 < last <= samples_per_shard
    names = [f"{number:05d}.tar" for number in range(len(full) + 1)]
    assert json.loads((tmp_path / "out/sizes.json").read_bytes()) == dict(zip(names, [*full, last], strict=True))
    one_to_one = json.loads((unpacked / "summary.json").read_bytes())
    for name in ("seen", "kept", "dropped", "torn_shards", "truncated_captions"):
        assert summary[name] == one_to_one[name]
    dataset = webdataset.WebDataset([str(tmp_path / "out" / name) for name in names], shardshuffle=False)
    assert sum(1 for _ in dataset) == summary["kept"]


@pytest.mark.parametrize("samples_per_shard", [1, 10])
def test_marks_say_which_samples_of_which_shards_an_output_accounts_for(shards, scores, tmp_path, samples_per_shard):
    pack(shards, tmp_path / "out", scores, samples_per_shard)
    covered: Counter[str] = Counter()
    for path in sorted((tmp_path / "out").glob("*_stats.json")):
        stats = json.loads(path.read_bytes())
        assert sum(source["stop"] - source["start"] for source in stats["sources"]) == stats["seen"]
        assert sum(source["kept"] for source in stats["sources"]) == stats["kept"]
        for source in stats["sources"]:
            assert covered[source["source"]] == source["start"]
            covered[source["source"]] = source["stop"]
            assert source["num_bytes"] == (shards / source["source"].rpartition("/")[2]).stat().st_size
    tables = {table.metadata.shard: table.table.num_rows for table in map(ShardScores.read, scores.glob("*.parquet"))}
    assert {url: num_samples for url, num_samples in tables.items() if num_samples} == dict(+covered)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_run_that_scores_packs_alike(scorer, shards, scores, tmp_path, num_workers):
    run(scorer, f"{shards}/*.tar", tmp_path / "fresh", samples_per_shard=10, num_workers=num_workers)
    pack(shards, tmp_path / "later", scores, 10)
    fresh = {name: digest for name, digest in bits(tmp_path / "fresh").items() if not name.startswith("_scores")}
    assert fresh == bits(tmp_path / "later")


def test_a_fraction_can_be_packed(shards, scores, tmp_path):
    summary = pack(shards, tmp_path / "out", scores, 10, threshold=None, keep_fraction=0.5)
    num_scored = sum(ShardScores.read(path).usable.sum() for path in scores.glob("*.parquet"))
    assert summary["kept"] == round(0.5 * num_scored)


def test_an_output_that_is_lost_is_made_again_alone_and_with_the_same_bits(shards, scores, tmp_path):
    summary = pack(shards, tmp_path / "out", scores, 10)
    before = bits(tmp_path / "out")
    (tmp_path / "out/00001.tar").unlink()
    (tmp_path / "out/00002_stats.json").unlink()
    assert pack(shards, tmp_path / "out", scores, 10)["resumed_shards"] == summary["shards"] - 2
    assert bits(tmp_path / "out") == before


def test_a_new_plan_replaces_the_old_one_and_leaves_nothing_of_it(shards, scores, tmp_path):
    shutil.copytree(shards, tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "out", scores, 5)
    (tmp_path / "in/00000.tar").unlink()
    pack(tmp_path / "in", tmp_path / "out", scores, 5)
    pack(tmp_path / "in", tmp_path / "at once", scores, 5)
    assert bits(tmp_path / "out") == bits(tmp_path / "at once")


def test_other_settings_and_shards_that_were_not_packed_are_refused(shards, scores, unpacked, tmp_path):
    pack(shards, tmp_path / "out", scores, 10)
    before = bits(tmp_path / "out")
    with pytest.raises(ValueError, match="samples_per_shard 10 there, 20 here"):
        pack(shards, tmp_path / "out", scores, 20)
    with pytest.raises(ValueError, match="samples_per_shard 10 there, null here"):
        pack(shards, tmp_path / "out", scores, None)
    assert bits(tmp_path / "out") == before
    shutil.copytree(unpacked, tmp_path / "unpacked")
    before = bits(tmp_path / "unpacked")
    with pytest.raises(ValueError, match="samples_per_shard null there, 10 here"):
        pack(shards, tmp_path / "unpacked", scores, 10)
    assert bits(tmp_path / "unpacked") == before
    with pytest.raises(ValueError, match="must be at least 1"):
        pack(shards, tmp_path / "none", scores, 0)


def test_nothing_kept_is_one_mark_without_a_tar(shards, scores, tmp_path):
    summary = pack(shards, tmp_path / "out", scores, 10, threshold=1.0)
    assert (summary["kept"], summary["shards"]) == (0, 1)
    assert summary["seen"] > 60
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000_stats.json",
        "sizes.json",
        "summary.json",
    ]


def test_a_shard_that_changed_is_left_out_and_one_that_is_damaged_costs_its_outputs_only(shards, scores, tmp_path):
    shutil.copytree(shards, tmp_path / "in")
    (tmp_path / "in/00001.tar").write_bytes(b"another size")
    members = tar_members(shards / "00003.tar")
    times = (tmp_path / "in/00003.tar").stat()
    write_tar(tmp_path / "in/00003.tar", [(f"9{name[1:]}", data) for name, data in members])
    os.utime(tmp_path / "in/00003.tar", ns=(times.st_atime_ns, times.st_mtime_ns))  # so that the plan is fooled
    summary = pack(tmp_path / "in", tmp_path / "out", scores, 5)
    failed = {url.removeprefix(f"{tmp_path}/"): why for url, why in summary["failed_shards"].items()}
    assert "bytes here" in failed.pop("in/00001.tar")
    assert failed
    assert all(url.startswith("out/") and "in/00003.tar: its sample" in why for url, why in failed.items())
    made = [path.name for path in (tmp_path / "out").glob("*.tar")]
    assert made
    assert not set(made) & {url.removeprefix("out/") for url in failed}


def a_source(url: str, start: int, stop: int, num_kept: int) -> Source:
    numbers = {"start": start, "stop": stop, "num_kept": num_kept}
    return Source(url=url, table=Path("t"), identity=ShardIdentity(0), cutoff=None, to_end=False, **numbers)


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5), min_size=1, max_size=4),
    st.data(),
)
def test_only_a_plan_that_takes_every_sample_once_is_accepted(cuts, data):
    sources, counts = [], {}
    for shard, sizes in enumerate(cuts):
        stops = np.cumsum([size for size, _ in sizes]).tolist()
        starts = [0, *stops[:-1]]
        kept = [min(size, num_kept) for size, num_kept in sizes]
        sources += [a_source(f"{shard}.tar", *numbers) for numbers in zip(starts, stops, kept, strict=True)]
        counts[f"{shard}.tar"] = (stops[-1], sum(kept))
    check_covered([sources[:2], [], sources[2:]], counts)
    place = data.draw(st.integers(0, len(sources) - 1))
    source = sources[place]
    wrong = {
        "lost": [],
        "twice": [source, source],
        "shorter": [replace(source, stop=source.stop - 1)],
        "longer": [replace(source, stop=source.stop + 1)],
        "later": [replace(source, start=source.start + 1)],
        "other number": [replace(source, num_kept=source.num_kept + 1)],
    }[data.draw(st.sampled_from(["lost", "twice", "shorter", "longer", "later", "other number"]))]
    with pytest.raises(ValueError, match="loses samples or takes them twice"):
        check_covered([sources[:place], wrong, sources[place + 1 :]], counts)


class TestKeys:
    @pytest.fixture
    def twins(self, tmp_path):
        """Two shards with the same keys, as two downloads have them."""
        for folder in "ab":
            samples = [{**pair(ord(folder) + i), "seg.npy": folder.encode()} for i in range(6)]
            write_shard(tmp_path / "in" / f"{folder}.tar", samples)
        return tmp_path / "in"

    @pytest.mark.parametrize("samples_per_shard", [5, 100])
    def test_that_come_twice_get_a_suffix_and_nothing_else_changes(self, scorer, twins, tmp_path, samples_per_shard):
        options = {"scorer": scorer, "shards": f"{twins}/*.tar", "threshold": -1}
        summary = run(output=tmp_path / "out", samples_per_shard=samples_per_shard, **options)
        assert summary["renamed_keys"] == 6
        original = [*tar_members(twins / "a.tar"), *tar_members(twins / "b.tar")]
        members = all_members(tmp_path / "out")
        assert [data for _, data in members] == [data for _, data in original]
        assert [name for name, _ in members[:18]] == [name for name, _ in original[:18]]
        renamed = [f"{name[:9]}_1{name[9:]}" for name, _ in original[18:]]
        assert [name for name, _ in members[18:]] == renamed
        marks = [json.loads(path.read_bytes()) for path in (tmp_path / "out").glob("*_stats.json")]
        assert sum(mark["renamed_keys"] for mark in marks) == 6


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.integers(1, 40), st.sampled_from([-1.0, 0.1, 0.12, 0.15, 1.0]), st.randoms(use_true_random=False))
def test_any_part_of_a_pack_can_be_missing(shards, scores, tmp_path_factory, samples_per_shard, threshold, rng):
    output = tmp_path_factory.mktemp("packed")
    pack(shards, output, scores, samples_per_shard, threshold=threshold)
    before = bits(output)
    for path in list(output.iterdir()):
        if rng.random() < 0.4:
            path.unlink()
    for _ in range(2):
        pack(shards, output, scores, samples_per_shard, threshold=threshold)
    assert bits(output) == before
