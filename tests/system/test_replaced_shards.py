"""A shard that was replaced by another of equal size is noticed; one that was only touched or copied costs nothing."""

import json
import os
import shutil
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from clipfilter_wds.scores.table import ShardScores
from tests.support.outputs import bits, check_accounting
from tests.support.restore import Recipe, flat, keys
from tests.support.toys import pair, write_shard

PER_SHARD = 6
#: The runs that score, and those that copy by the scores that one of them made.
SCORING = {
    "score": ("score",),
    "rewrite": ("rewrite", "--threshold", 0),
    "fraction": ("rewrite", "--keep_fraction", 0.5),
    "packed": ("rewrite", "--threshold", 0, "--samples_per_shard", 4),
}
COPYING = {
    "rewrite": ("rewrite", "--threshold", 0),
    "nothing kept": ("rewrite", "--threshold", 1),
    "fraction": ("rewrite", "--keep_fraction", 0.5),
    "packed": ("rewrite", "--threshold", 0, "--samples_per_shard", 4),
}
scoring = pytest.mark.parametrize("options", SCORING.values(), ids=list(SCORING))
copying = pytest.mark.parametrize("options", COPYING.values(), ids=list(COPYING))


@pytest.fixture
def shards(tmp_path) -> Path:
    for number in range(2):
        write_shard(tmp_path / "in" / f"{number:05d}.tar", [pair(10 * number + i) for i in range(PER_SHARD)])
    return tmp_path / "in"


@pytest.fixture
def run(command, clip_folder):
    """Run a command over shards; its exit code and summary."""

    def run_(options: tuple, shards: Path | str, output: Path, *more) -> tuple[int, dict]:
        name, *rest = options
        model = () if "--scores" in more else ("--model", clip_folder, "--device", "cpu", "--batch_size", 8)
        pattern = f"{shards}/*.tar"
        code, said = command(name, pattern, "--output", output, "--num_workers", 0, *model, *rest, *more)
        assert code in (0, 1), said
        return code, json.loads((output / "summary.json").read_bytes())

    return run_


def replace_shard(folder: Path) -> None:
    """Other pairs under the same keys, in a tar of the same size."""
    path = folder / "00001.tar"
    size = path.stat().st_size
    write_shard(path, [pair(100 + i) for i in range(PER_SHARD)])
    assert path.stat().st_size == size


def touch(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        os.utime(path)


def copy_over(folder: Path) -> None:
    """As `cp` without times."""
    for path in folder.glob("*.tar"):
        shutil.copyfile(path, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)


def tars(folder: Path) -> dict[str, str]:
    """Digest of every tar."""
    return {name: digest for name, digest in bits(folder).items() if name.endswith(".tar")}


# --- where shards are scored ---


@scoring
def test_a_replaced_shard_is_done_again(run, shards, tmp_path, options):
    run(options, shards, tmp_path / "out")
    replace_shard(shards)
    assert run(options, shards, tmp_path / "out")[1]["scored"] == PER_SHARD
    run(options, shards, tmp_path / "fresh")
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


@scoring
@pytest.mark.parametrize("change", [touch, copy_over])
def test_a_shard_whose_bytes_are_the_same_is_not(run, shards, tmp_path, options, change):
    _, first = run(options, shards, tmp_path / "out")
    before = bits(tmp_path / "out")
    change(shards)
    _, second = run(options, shards, tmp_path / "out")
    assert (second["scored"], second["resumed_shards"]) == (0, first["shards"])
    assert bits(tmp_path / "out") == before


def test_a_run_that_left_only_tables_copies_from_them_after_shards_were_touched(run, shards, tmp_path):
    run(SCORING["rewrite"], shards, tmp_path / "out")
    before = tars(tmp_path / "out")
    for path in tmp_path.glob("out/0*"):
        path.unlink()
    touch(shards)
    assert run(SCORING["rewrite"], shards, tmp_path / "out")[1]["scored"] == 0
    assert tars(tmp_path / "out") == before
    check_accounting(tmp_path / "out")


def test_it_is_so_on_other_storage(run, shards, tmp_path):
    fs = fsspec.filesystem("memory")
    try:
        fs.put(f"{shards}/", "/replaced/", recursive=True)
        run(SCORING["score"], "memory://replaced", tmp_path / "out")
        fs.put(f"{shards}/", "/replaced/", recursive=True)
        assert run(SCORING["score"], "memory://replaced", tmp_path / "out")[1]["scored"] == 0
        replace_shard(shards)
        fs.put(f"{shards}/", "/replaced/", recursive=True)
        assert run(SCORING["score"], "memory://replaced", tmp_path / "out")[1]["scored"] == PER_SHARD
    finally:
        fs.rm("/replaced", recursive=True)


# --- where scores are used ---


@pytest.fixture
def scores(run, shards, tmp_path) -> Path:
    run(SCORING["score"], shards, tmp_path / "scores")
    return tmp_path / "scores"


@copying
@pytest.mark.parametrize("begun", [False, True])
def test_scores_of_a_shard_that_was_replaced_are_not_used(run, shards, scores, tmp_path, options, begun):
    if begun:
        run(options, shards, tmp_path / "out", "--scores", scores)
    replace_shard(shards)
    code, summary = run(options, shards, tmp_path / "out", "--scores", scores)
    assert (code, [Path(url).name for url in summary["failed_shards"]]) == (1, ["00001.tar"])
    assert summary["seen"] == PER_SHARD
    if not begun:  # else the mark of what was made of the shard before may still be there
        check_accounting(tmp_path / "out")


@copying
def test_scores_serve_for_a_copy_in_another_place(run, shards, scores, tmp_path, options):
    run(options, shards, tmp_path / "out", "--scores", scores)
    (tmp_path / "copy").mkdir()
    for path in shards.glob("*.tar"):
        shutil.copyfile(path, tmp_path / "copy" / path.name)
    code, summary = run(options, tmp_path / "copy", tmp_path / "out of copy", "--scores", scores)
    assert (code, summary["seen"]) == (0, 2 * PER_SHARD)
    assert tars(tmp_path / "out of copy") == tars(tmp_path / "out")
    _, again = run(options, tmp_path / "copy", tmp_path / "out of copy", "--scores", scores)
    assert again["resumed_shards"] == summary["shards"]


def test_tables_and_marks_without_a_signature_go_by_the_size(run, shards, scores, tmp_path):
    for path in scores.glob("*.parquet"):
        without_identity(path)
    replace_shard(shards)
    code, summary = run(COPYING["rewrite"], shards, tmp_path / "out", "--scores", scores)
    assert (code, summary["seen"]) == (0, 2 * PER_SHARD)
    mark = tmp_path / "out" / "00001_stats.json"
    record = json.loads(mark.read_bytes())
    del record["signature"], record["storage_version"]
    mark.write_text(json.dumps(record))
    touch(shards)
    assert run(COPYING["rewrite"], shards, tmp_path / "out", "--scores", scores)[1]["resumed_shards"] == 2


def without_identity(path: Path) -> None:
    """Rewrite a table as the first version wrote it."""
    scores = ShardScores.read(path)
    [(name, text)] = scores.metadata.to_schema().items()
    says = json.loads(text)
    del says["signature"], says["storage_version"]
    pq.write_table(scores.table.replace_schema_metadata({name: json.dumps(says)}), path)


# --- in training ---


@pytest.fixture
def recipe(clip_folder, shards) -> Recipe:
    return Recipe(clip=clip_folder, shards=f"{shards}/*.tar", loader={"threshold": None, "batch_size": 4})


@pytest.mark.parametrize("source", ["scores", "record"])
def test_training_takes_scores_of_touched_shards_and_not_of_replaced_ones(recipe, shards, scores, tmp_path, source):
    if source == "record":
        recipe = recipe.but(record=tmp_path / "record")
        keys(recipe.build())
    else:
        recipe = recipe.from_table(scores)
    touch(shards)
    loader = recipe.build()
    assert len(flat(keys(loader))) == loader.stats.kept == 2 * PER_SHARD
    replace_shard(shards)
    with pytest.raises(ValueError, match=r"00001\.tar: it is not the shard that was scored: members of other names"):
        keys(recipe.build())
