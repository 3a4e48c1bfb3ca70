"""Embeddings recorded while a loader trains: the files that ``score --embeddings`` writes."""

import shutil
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores, read_metadata
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.training import record as recording
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from tests.support.batches import write_mixed, write_scores
from tests.support.fitting import fit
from tests.support.processes import run_ranks
from tests.support.recording import train_until_killed
from tests.support.restore import Recipe, keys, write_numbered


@pytest.fixture(scope="module")
def scored(clip_folder, tmp_path_factory) -> Recipe:
    """A loader that scores, in shuffled batches of other samples than ``score`` puts together."""
    folder = tmp_path_factory.mktemp("shards")
    shards = write_mixed(folder)
    (folder / "00006.tar").unlink()  # no tar, so that it never has scores
    loader = {"threshold": None, "batch_size": 5, "score_batch_size": 4, "record_embeddings": "fp16"}
    return Recipe(clip=clip_folder, shards=shards, dataset={"seed": 1, "shuffle": 10}, loader=loader)


@pytest.fixture(scope="module")
def tables(scored, tmp_path_factory) -> Path:
    return write_scores(scored, tmp_path_factory.mktemp("scores"), embeddings="fp16")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def check_recorded(record: Path, scores: Path, *, tolerance: float = 0.0) -> None:
    """The record holds the embeddings that ``score`` saves, and nothing else."""
    assert files(record) == files(scores) - {"summary.json"}
    recorded, made = ScoreFolder(record), ScoreFolder(scores)
    for path in recorded.paths:
        other = made.folder / path.relative_to(recorded.folder)
        ours, theirs = ShardScores.read(path), ShardScores.read(other)
        assert ours.metadata.embeddings == theirs.metadata.embeddings
        assert ours.table.drop_columns("score").equals(theirs.table.drop_columns("score"))
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-5)
        found = recorded.embedding_files(path).read(ours.metadata)
        expected = made.embedding_files(other).read(theirs.metadata)
        for one, two in ((found.image, expected.image), (found.text, expected.text)):
            np.testing.assert_allclose(one, two, rtol=0, atol=tolerance)
            assert not one[~ours.usable].any()


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_an_epoch_records_the_embeddings_that_score_saves(scored, tmp_path, dtype):
    scores = write_scores(scored, tmp_path / "scores", embeddings=dtype)
    keys(scored.build(record=tmp_path / "record", record_embeddings=dtype))
    check_recorded(tmp_path / "record", scores)


def test_embeddings_of_low_precision_differ_by_its_rounding_only(scored, tmp_path):
    """The last bits depend on what is computed together, and training's batches are others."""
    scorer = ClipScorer(scored.clip, device="cpu", precision="bf16")
    process_shards(
        ScoreConfig(shards=scored.shards, output=tmp_path / "scores", embeddings="fp16", num_workers=0), scorer
    )
    dataset = ClipWebDataset(scored.shards, scorer.preprocess, **scored.dataset)
    keys(ClipFilterLoader(dataset, scorer, **scored.loader, record=tmp_path / "record"))
    check_recorded(tmp_path / "record", tmp_path / "scores", tolerance=2**-9)


def test_what_is_held_back_is_bounded(scored, tables, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_MAX_HELD_ROWS", 4)
    loader = scored.build(record=tmp_path)
    for _ in islice(loader, 3):
        pass
    assert (
        len(list((tmp_path / "_parts").glob("*.image.npy"))) == len(list((tmp_path / "_parts").glob("*.parquet"))) > 2
    )
    assert all(len(np.load(path)) < 4 + 4 for path in (tmp_path / "_parts").glob("*.npy"))
    keys(scored.build(record=tmp_path))
    check_recorded(tmp_path, tables)


def run_epochs(recipe: Recipe) -> None:
    keys(recipe.build(), 2)


def test_ranks_record_for_one_another(scored, tables, tmp_path):
    run_ranks(2, run_epochs, scored.but(record=tmp_path, num_workers=1))
    keys(scored.build(record=tmp_path))  # what the ranks had left over when their epochs ended
    check_recorded(tmp_path, tables)


def test_a_run_that_was_killed_is_continued_to_the_same_embeddings(clip_folder, tmp_path):
    shards = write_numbered(tmp_path / "in", [[1000 * shard + n for n in range(6)] for shard in range(40)])
    loader = {"threshold": None, "record": tmp_path / "record", "record_embeddings": "fp16"}
    recipe = Recipe(clip=clip_folder, shards=shards, loader=loader)
    train_until_killed(recipe, tmp_path / "record", 5)
    folder = ScoreFolder(tmp_path / "record")
    assert len(folder.paths) >= 5
    for path in folder.paths:  # no table that is there lacks its embeddings
        folder.embedding_files(path).read(read_metadata(path))
    keys(recipe.build())
    check_recorded(tmp_path / "record", write_scores(recipe, tmp_path / "scores", embeddings="fp16"))


@pytest.mark.parametrize("has_table", [False, True])
def test_a_run_that_was_killed_while_it_made_a_table_leaves_nothing_behind(scored, tables, tmp_path, has_table):
    keys(scored.build(record=tmp_path))
    part = tmp_path / "_parts" / sha256(b"00001").hexdigest()
    for name in ("00001.parquet", "_embeddings/00001.image.npy", "_embeddings/00001.text.npy"):
        ending = name.partition(".")[2]
        (tmp_path / name).rename(f"{part}.{'0' * 32}.{ending}")
        if has_table:
            shutil.copyfile(f"{part}.{'0' * 32}.{ending}", tmp_path / name)
    keys(scored.build(record=tmp_path))
    check_recorded(tmp_path, tables)


# --- a record that has none, or others ---


def test_what_was_recorded_without_embeddings_is_scored_again(scored, tables, tmp_path):
    plain = scored.but(record=tmp_path, record_embeddings=None)
    for _ in islice(plain.build(), 4):  # whole shards, and parts
        pass
    assert list(tmp_path.glob("*.parquet"))
    assert list(tmp_path.glob("_parts/*.parquet"))
    keys(scored.build(record=tmp_path))
    check_recorded(tmp_path, tables)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    keys(plain.build())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_embeddings_that_were_deleted_are_made_again(scored, tables, tmp_path):
    keys(scored.build(record=tmp_path))
    (tmp_path / "_embeddings" / "00001.text.npy").unlink()
    keys(scored.build(record=tmp_path))
    check_recorded(tmp_path, tables)


def test_embeddings_of_another_type_are_replaced(scored, tmp_path):
    keys(scored.build(record=tmp_path / "record"))
    keys(scored.build(record=tmp_path / "record", record_embeddings="fp32"))
    check_recorded(tmp_path / "record", write_scores(scored, tmp_path / "scores", embeddings="fp32"))


# --- options ---


def test_embeddings_need_a_record_and_a_type():
    with pytest.raises(ValueError, match="record_embeddings go beside recorded scores; give the folder"):
        LoaderConfig(record_embeddings="fp16")
    with pytest.raises(ValueError, match="record_embeddings is 'bf16'; use fp16 or fp32"):
        LoaderConfig(record="scores", record_embeddings="bf16")


def test_a_data_module_records_what_it_trains_on(data, tmp_path):
    fit({**data, "record": tmp_path, "record_embeddings": "fp16"}, {"max_epochs": 1})
    names = [Path(url).stem for url in expand_shards(data["train"])]
    endings = ("{}.parquet", "_embeddings/{}.image.npy", "_embeddings/{}.text.npy")
    assert files(tmp_path) == {ending.format(name) for name in names for ending in endings}
