"""What is kept: a fraction of the run, a subset; in a run that scores, and from tables that were made before."""

import json
import shutil

import numpy as np
import pytest

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.subset import UID
from clipfilter_wds.scores.table import ShardScores
from tests.support.outputs import bits, check_accounting
from tests.support.toys import pair, tar_members, write_shard

NUM_SHARDS, PER_SHARD = 3, 20


def uid_of(shard: int, index: int) -> int:
    return (index * 7919 % 251 << 120) | (shard << 64) | index


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards with uids, three equal pairs in each, and one image that is none."""
    folder = tmp_path_factory.mktemp("in")
    for shard in range(NUM_SHARDS):
        pairs = [pair(100 * shard + i if i not in (3, 4, 5) else 42) for i in range(PER_SHARD)]
        pairs[7] = {"jpg": b"no image", "txt": b"a caption"}
        uids = [json.dumps({"uid": f"{uid_of(shard, i):032x}"}).encode() for i in range(PER_SHARD)]
        samples = [{**members, "json": uid} for members, uid in zip(pairs, uids, strict=True)]
        write_shard(folder / f"{shard:05d}.tar", samples, start=1000 * shard)
    return folder


@pytest.fixture(scope="module")
def scores(scorer, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    process_shards(ScoreConfig(shards=f"{shards}/*.tar", output=folder, batch_size=1, num_workers=0), scorer)
    return folder


def rewrite(shards, output, scorer=None, **options) -> dict:
    config = RewriteConfig(shards=f"{shards}/*.tar", output=output, batch_size=1, num_workers=0, **options)
    process_shards(config, scorer)
    return check_accounting(output)


def kept_keys(folder) -> list[str]:
    return [name[:-4] for path in sorted(folder.glob("*.tar")) for name, _ in tar_members(path) if name.endswith("jpg")]


def all_scores(scores) -> dict[str, float]:
    """Key -> score, of what could be scored, in order."""
    tables = [ShardScores.read(path) for path in sorted(scores.glob("*.parquet"))]
    return {
        key: score
        for table in tables
        for key, score, usable in zip(table.keys, table.scores, table.usable, strict=True)
        if usable
    }


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 0.85, 1])
def test_a_fraction_keeps_the_highest_scores_of_the_whole_run(scorer, shards, scores, tmp_path, fraction):
    by_key = all_scores(scores)
    wanted = sorted(by_key, key=by_key.get, reverse=True)[: round(fraction * len(by_key))]  # sorted keeps order of ties
    for output, options in (("fresh", {"scorer": scorer}), ("later", {"scores": scores})):
        summary = rewrite(shards, tmp_path / output, keep_fraction=fraction, **options)
        assert kept_keys(tmp_path / output) == sorted(wanted)
        assert (summary["seen"], summary["kept"]) == (NUM_SHARDS * PER_SHARD, len(wanted))
        assert (summary["threshold"], summary["keep_fraction"]) == (None, fraction)
        assert summary["cut"] == (by_key[wanted[-1]] if wanted else None)
        assert summary["dropped"].get("unreadable_image") == NUM_SHARDS
    assert summary["scored"] == 0


def test_ties_at_the_cut_are_told_apart_by_shard_and_index(shards, scores, tmp_path):
    by_key = all_scores(scores)
    ties = [key for key in by_key if by_key[key] == by_key["000000003"]]
    assert len(ties) == 3 * NUM_SHARDS
    num_above = sum(score > by_key[ties[0]] for score in by_key.values())
    for num_ties in range(1, 9):
        output = tmp_path / str(num_ties)
        summary = rewrite(shards, output, scores=scores, keep_fraction=(num_above + num_ties) / len(by_key))
        assert (summary["cut"], summary["cut_ties_dropped"]) == (by_key[ties[0]], len(ties) - num_ties)
        assert [key for key in kept_keys(output) if key in ties] == ties[:num_ties]


def test_a_fraction_is_cut_anew_when_more_shards_can_be_used(scorer, shards, scores, tmp_path):
    shutil.copytree(shards, tmp_path / "in")
    whole = (tmp_path / "in/00001.tar").read_bytes()
    (tmp_path / "in/00001.tar").write_bytes(b"garbage" * 1000)
    summary = rewrite(tmp_path / "in", tmp_path / "out", scorer, keep_fraction=0.3)
    assert (summary["seen"], len(summary["failed_shards"])) == (2 * PER_SHARD, 1)
    (tmp_path / "in/00001.tar").write_bytes(whole)
    summary = rewrite(tmp_path / "in", tmp_path / "out", scorer, keep_fraction=0.3)
    assert not summary["failed_shards"]
    rewrite(shards, tmp_path / "at once", scores=scores, keep_fraction=0.3)
    assert kept_keys(tmp_path / "out") == kept_keys(tmp_path / "at once")


def test_what_is_done_is_not_done_again(shards, scores, tmp_path):
    rewrite(shards, tmp_path / "out", scores=scores, keep_fraction=0.5)
    before = bits(tmp_path / "out")
    (tmp_path / "out/00001_stats.json").unlink()
    assert rewrite(shards, tmp_path / "out", scores=scores, keep_fraction=0.5)["resumed_shards"] == 2
    assert bits(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"keep_fraction 0\.5 there, 0\.4 here"):
        rewrite(shards, tmp_path / "out", scores=scores, keep_fraction=0.4)
    with pytest.raises(ValueError, match=r"threshold null there, 0\.25 here; keep_fraction 0\.5 there, null here"):
        rewrite(shards, tmp_path / "out", scores=scores)


@pytest.fixture(params=["uids.npy", "keys.txt"])
def subset(request, tmp_path):
    """Every third sample, and samples that are in no shard."""
    places = [(shard, i) for shard in range(NUM_SHARDS + 1) for i in range(1, PER_SHARD, 3)]
    if request.param == "uids.npy":
        uids = np.array(sorted(divmod(uid_of(*place), 2**64) for place in places), dtype=UID)
        np.save(tmp_path / request.param, uids)
    else:
        (tmp_path / request.param).write_text("".join(f"{1000 * shard + i:09d}\n" for shard, i in places))
    return tmp_path / request.param


LISTED = [f"{1000 * shard + i:09d}" for shard in range(NUM_SHARDS) for i in range(1, PER_SHARD, 3)]


class TestSubset:
    def test_keeps_only_what_is_listed(self, scorer, shards, scores, subset, tmp_path):
        usable = [key for key in LISTED if key in all_scores(scores)]
        for output, options in (("fresh", {"scorer": scorer}), ("later", {"scores": scores})):
            summary = rewrite(shards, tmp_path / output, subset=subset, **options)
            assert kept_keys(tmp_path / output) == usable
            num_listed = len(LISTED)
            dropped = {"unreadable_image": NUM_SHARDS, "not_in_subset": NUM_SHARDS * PER_SHARD - num_listed}
            assert summary["dropped"] == dropped
            assert summary["threshold"] is None

    @pytest.mark.parametrize("choice", [{"threshold": 0.12}, {"keep_fraction": 0.4}])
    def test_goes_with_a_threshold_or_a_fraction_of_itself(self, scorer, shards, scores, subset, tmp_path, choice):
        by_key = {key: score for key, score in all_scores(scores).items() if key in LISTED}
        wanted = {key for key, score in by_key.items() if score >= choice.get("threshold", -1)}
        if "keep_fraction" in choice:
            wanted = set(sorted(by_key, key=by_key.get, reverse=True)[: round(0.4 * len(by_key))])
        assert 0 < len(wanted) < len(by_key)
        for output, options in (("fresh", {"scorer": scorer}), ("later", {"scores": scores})):
            rewrite(shards, tmp_path / output, subset=subset, **choice, **options)
            assert kept_keys(tmp_path / output) == sorted(wanted)

    def test_what_is_not_listed_is_not_decoded(self, scorer, shards, subset, tmp_path):
        rewrite(shards, tmp_path / "out", scorer, subset=subset)
        table = ShardScores.read(tmp_path / "out/_scores/00000.parquet").table.to_pylist()
        assert all((row["width"] > 0) == (row["reason"] is None) for row in table)
        assert {row["key"] for row in table if row["reason"] != "not_in_subset"} == set(LISTED[: len(LISTED) // 3])

    def test_another_list_is_refused(self, shards, scores, subset, tmp_path):
        rewrite(shards, tmp_path / "out", scores=scores, subset=subset)
        (tmp_path / "other.txt").write_text("000000001\n")
        with pytest.raises(ValueError, match=r"subset .* there, .* here"):
            rewrite(shards, tmp_path / "out", scores=scores, subset=tmp_path / "other.txt")


@pytest.mark.parametrize("choice", [{}, {"keep_fraction": 0.5}])
def test_a_shard_without_uids_fails_alone_when_the_subset_lists_uids(scorer, shards, tmp_path, choice):
    shutil.copytree(shards, tmp_path / "in")
    write_shard(tmp_path / "in/new.tar", [pair(1)])
    np.save(tmp_path / "uids.npy", np.array([divmod(uid_of(0, 1), 2**64)], dtype=UID))
    summary = rewrite(tmp_path / "in", tmp_path / "out", scorer, subset=tmp_path / "uids.npy", **choice)
    [(url, why)] = summary["failed_shards"].items()
    assert url.endswith("new.tar")
    assert "lists uids, and none of the samples has one" in why
    assert summary["seen"] == NUM_SHARDS * PER_SHARD
