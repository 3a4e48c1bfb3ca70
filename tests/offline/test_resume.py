"""A run that was stopped between a shard's score table, its tar and its mark."""

import json
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline import commit
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.engines.ray import RayEngine
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.offline.tally import Tally
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.world import World
from tests.support.outputs import bits, check_accounting
from tests.support.pace import FOREVER
from tests.support.processes import context
from tests.support.toys import make_clip, pair, write_shard

NUM_SHARDS, PER_SHARD = 3, 30
OPTIONS = {"batch_size": 8, "num_workers": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough for a band as real models have it."""
    return make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)


@pytest.fixture(scope="module")
def bf16(folder):
    return ClipScorer(folder, device="cpu", precision="bf16")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("in")
    for shard in range(NUM_SHARDS):
        write_shard(folder / f"{shard:05d}.tar", [pair(100 * shard + i) for i in range(PER_SHARD)], start=1000 * shard)
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def threshold(bf16, shards, tmp_path_factory) -> float:
    """The score of a sample, so that others lie within the band around it."""
    output = tmp_path_factory.mktemp("scores")
    process_shards(ScoreConfig(shards=shards, output=output, **OPTIONS), bf16)
    return sorted(ShardScores.read(output / "00001.parquet").scores.tolist())[PER_SHARD // 2]


@pytest.fixture(scope="module")
def whole(bf16, shards, threshold, tmp_path_factory):
    """What an undisturbed run writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    process_shards(RewriteConfig(shards=shards, output=output, threshold=threshold, embeddings="fp16", **OPTIONS), bf16)
    return output


@pytest.fixture
def config(shards, threshold, tmp_path) -> RewriteConfig:
    return RewriteConfig(shards=shards, output=tmp_path / "out", threshold=threshold, embeddings="fp16", **OPTIONS)


def run_and_die(config: RewriteConfig, folder, point: str) -> None:
    """A run that is killed at the second shard, with its table written (``tar``), or its tar too (``mark``)."""
    multiprocessing.set_start_method("fork", force=True)  # so that the processes that write are patched too
    patch, run = pytest.MonkeyPatch(), psutil.Process()
    write_json, write_tar = commit.publish_json, commit.OutputFiles._write_tar

    def die_or(write, name, *args):
        if name.startswith("00001"):
            wait_for(config.folder / "00000_stats.json")  # which another process may be about to write
            family = " ".join(str(child.pid) for child in run.children(recursive=True))
            run.kill()
            (config.folder.parent / "family").write_text(family)
            time.sleep(FOREVER)  # until this process has noticed
        return write(*args)

    if point == "tar":
        patch.setattr(commit.OutputFiles, "_write_tar", lambda self, it: die_or(write_tar, self.name, self, it))
    else:
        patch.setattr(commit, "publish_json", lambda path, content: die_or(write_json, path.name, path, content))
    process_shards(config, ClipScorer(folder, device="cpu", precision="bf16"))


def rewrite_table(config: RewriteConfig, change) -> None:
    """Change the second shard's table, and lose what was made from it."""
    for name in ("00001.tar", "00001_stats.json"):
        (config.folder / name).unlink()
    path = config.table_folder / "00001.parquet"
    scores = ShardScores.read(path)
    with path.open("wb") as file:
        replace(scores, metadata=replace(scores.metadata, **change)).write(file)


def wait_for(file: Path) -> None:
    """Until a file is there and not empty."""
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)


def wait_for_end(family: Path) -> None:
    """Of the processes whose numbers are in a file, which is about to be there."""
    wait_for(family)
    for pid in map(int, family.read_text().split()):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(FOREVER)


@pytest.mark.parametrize("point", ["tar", pytest.param("mark", marks=pytest.mark.slow)])
def test_a_killed_run_scores_nothing_again_whose_table_is_there(config, folder, bf16, whole, point):
    process = context.Process(target=run_and_die, args=(config, folder, point))
    process.start()
    process.join(FOREVER)
    assert process.exitcode == -signal.SIGKILL
    wait_for_end(config.folder.parent / "family")
    there = {path.name for path in config.folder.rglob("*.*")}
    assert {"00000_stats.json", "00001.parquet"} <= there
    assert ("00001.tar" in there) == (point == "mark")
    assert "00001_stats.json" not in there
    num_tables = sum(name.endswith(".parquet") for name in there)
    tally = process_shards(config, bf16)
    assert tally.num_scored == (NUM_SHARDS - num_tables) * PER_SHARD
    num_marks = sum(name.endswith("_stats.json") for name in there)
    assert (tally.resumed, tally.done, tally.failed) == (num_marks, NUM_SHARDS, {})
    assert bits(config.folder) == bits(whole)
    check_accounting(config.folder)


def test_with_all_tables_there_the_model_is_not_run_at_all(config, bf16, whole):
    passes = []
    hook = register_module_forward_pre_hook(lambda *_: passes.append(1))
    process_shards(config, bf16)
    assert passes
    for path in config.folder.glob("0*"):
        path.unlink()
    passes.clear()
    tally = process_shards(config, bf16)
    hook.remove()
    assert (passes, tally.num_scored) == ([], 0)
    assert tally.num_copied == tally.counts.seen == NUM_SHARDS * PER_SHARD
    assert bits(config.folder) == bits(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"rechecked_at": None},
        {"rechecked_at": 0.3},
        {"num_bytes": 1},
        {"shard": "/elsewhere/00001.tar"},
        {"fingerprint": {"model": "another"}},
    ],
    ids=["not rechecked", "rechecked elsewhere", "another size", "another shard", "another model"],
)
def test_a_table_of_another_run_is_not_reused(config, bf16, whole, change):
    process_shards(config, bf16)
    rewrite_table(config, change)
    assert process_shards(config, bf16).num_scored == PER_SHARD
    assert bits(config.folder) == bits(whole)


@pytest.mark.parametrize("num_bytes", [0, 1000])
def test_a_table_that_is_damaged_is_made_again(config, bf16, whole, num_bytes):
    process_shards(config, bf16)
    rewrite_table(config, {})
    os.truncate(config.table_folder / "00001.parquet", num_bytes)
    assert process_shards(config, bf16).num_scored == PER_SHARD
    assert bits(config.folder) == bits(whole)


@pytest.mark.parametrize("left", ["*.parquet", "*_stats.json"])
def test_a_resumed_run_scores_with_the_batch_size_of_the_first(shards, bf16, tmp_path, left):
    options = {"shards": shards, "num_workers": 0, "threshold": -1}
    process_shards(RewriteConfig(output=tmp_path / "out", batch_size=7, **options), bf16)
    whole = bits(tmp_path / "out")
    for path in tmp_path.rglob("out/**/0*"):
        if not path.match(left) or "00001" in path.name:
            path.unlink()
    again = RewriteConfig(output=tmp_path / "out", **options)
    assert process_shards(again, bf16).num_scored >= PER_SHARD
    assert bits(tmp_path / "out").items() <= whole.items()
    mark = json.loads((tmp_path / "out/00001_stats.json").read_bytes())
    assert (mark["batch_size"], ShardScores.read(tmp_path / "out/_scores/00001.parquet").metadata.batch_size) == (7, 7)


def test_another_batch_size_than_the_first_is_refused_where_it_changes_bits(shards, folder, bf16, tmp_path):
    options = {"shards": shards, "num_workers": 0, "output": tmp_path / "out"}
    process_shards(ScoreConfig(batch_size=7, **options), bf16)
    with pytest.raises(ValueError, match=r"\.parquet' was written with other settings \(batch_size 7 there, 9 here\)"):
        process_shards(ScoreConfig(batch_size=9, **options), bf16)
    exact = ClipScorer(folder, device="cpu", precision="fp32")
    options["output"] = tmp_path / "exact"
    process_shards(ScoreConfig(batch_size=7, **options), exact)
    table = tmp_path / "exact/00001.parquet"
    scores = ShardScores.read(table).scores
    table.unlink()
    assert process_shards(ScoreConfig(batch_size=9, **options), exact).num_scored == PER_SHARD
    assert ShardScores.read(table).metadata.batch_size == 9
    assert np.array_equal(ShardScores.read(table).scores, scores)


def test_a_fraction_is_not_cut_of_scores_that_were_rechecked_at_a_threshold(config, bf16, shards, tmp_path):
    process_shards(config, bf16)
    for path in config.folder.glob("0*"):
        path.unlink()
    options = {"shards": shards, "keep_fraction": 0.5, **OPTIONS}
    tally = process_shards(RewriteConfig(output=config.folder, **options), bf16)
    assert tally.num_scored == NUM_SHARDS * PER_SHARD
    process_shards(RewriteConfig(output=tmp_path / "fresh", embeddings=config.embeddings, **options), bf16)
    assert bits(config.folder) == bits(tmp_path / "fresh")  # the embeddings that were saved are kept


def test_ranks_reuse_tables(config, bf16, whole):
    process_shards(config, bf16)
    rewrite_table(config, {})
    (config.folder / "00000_stats.json").unlink()
    num_scored = [0, 0]
    for rank in (1, 0):  # rank zero waits for the marks of all

        def note(tally, rank=rank) -> None:
            num_scored[rank] = max(num_scored[rank], tally.num_scored)

        process_shards(config, bf16, world=World(rank=rank, world_size=2), rank_timeout=FOREVER, on_progress=note)
    assert num_scored == [0, 0]
    assert bits(config.folder) == bits(whole)
    check_accounting(config.folder)


@pytest.mark.slow
def test_ray_reuses_tables(config, folder, bf16, whole):
    pytest.importorskip("ray")
    process_shards(config, bf16)
    rewrite_table(config, {})
    with RayEngine(partial(ClipScorer, folder, device="cpu", precision="bf16"), use_gpus=False) as engine:
        tally = process_shards(config, engine)
    assert (tally.num_scored, tally.num_copied, tally.resumed) == (0, PER_SHARD, 2)
    assert bits(config.folder) == bits(whole)


def test_tables_that_were_rechecked_at_this_threshold_leave_nothing_in_the_band(whole, shards, threshold, tmp_path):
    options = {"shards": shards, "scores": whole, **OPTIONS}
    same = process_shards(RewriteConfig(output=tmp_path / "same", threshold=threshold, **options))
    assert 0 < same.stats.rechecked < NUM_SHARDS * PER_SHARD
    assert (same.stats.in_band, same.num_scored) == (0, 0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "same").glob("0*")} == {
        path.name: path.read_bytes() for path in whole.glob("0*")
    }
    other = process_shards(RewriteConfig(output=tmp_path / "other", threshold=threshold + 1e-6, **options))
    assert other.stats.in_band > 0


def test_outputs_that_something_deletes_while_the_run_goes_on_are_failures(scorer, tmp_path):
    for shard in range(6):
        write_shard(tmp_path / "in" / f"{shard}.tar", [pair(10 * shard + i) for i in range(4)])
    out = tmp_path / "out"

    def delete_once(tally: Tally) -> None:
        if tally.done == 3 and not (tmp_path / "deleted").exists():
            (tmp_path / "deleted").touch()
            for path in [*out.glob("*_stats.json"), *out.glob("*.tar")]:
                path.unlink()

    config = RewriteConfig(shards=f"{tmp_path}/in/*.tar", output=out, threshold=0.0, num_workers=0)
    tally = process_shards(config, scorer, on_progress=delete_once)
    whole = {path.stem for path in out.glob("*.tar") if path.with_name(f"{path.stem}_stats.json").exists()}
    gone = {str(shard) for shard in (tmp_path / "in").iterdir() if shard.stem not in whole}
    assert set(tally.failed) == gone
    assert len(gone) >= 2
    assert all("something has deleted it" in why for why in tally.failed.values())
    again = process_shards(config, scorer)
    assert (again.failed, again.done, again.resumed) == ({}, 6, 6 - len(gone))
