"""Scores recorded in the first epoch: the later ones cost no forward pass, and their batches are the same."""

import json
import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.preprocess import image as preprocess
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.training.record import RecordFolder, RecordLookup
from clipfilter_wds.types import DropReason, SampleRow, ShardEnd, ShardIdentity
from tests.support.batches import batches, check_same, write_mixed, write_scores
from tests.support.processes import run_ranks
from tests.support.recording import train_until_killed
from tests.support.restore import (
    Recipe,
    check_restores_after_every_batch,
    flat,
    image_number,
    keys,
    load_scorer,
    score_by_key,
    text_number,
    threshold_that_keeps,
    write_numbered,
)
from tests.support.toys import make_clip

NUM_USABLE = 3 * 12 + 9 + 5


class CountedRows:
    """Counts the pairs that a model is given."""

    def __init__(self, scorer: ClipScorer) -> None:
        self.num_rows = 0
        self._handle = scorer.fast.register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.num_rows += len(args[0])

    def take(self) -> int:
        """How many since the last time."""
        taken, self.num_rows = self.num_rows, 0
        return taken

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()


@pytest.fixture
def counted(clip_folder):
    with CountedRows(load_scorer(clip_folder)) as rows:
        yield rows


@pytest.fixture(scope="module")
def scored(clip_folder, tmp_path_factory) -> Recipe:
    """A loader that scores, and keeps half of the samples."""
    folder = tmp_path_factory.mktemp("shards")
    shards = write_mixed(folder)
    (folder / "00006.tar").unlink()  # no tar, so that it never has scores
    recipe = Recipe(
        clip=clip_folder,
        shards=shards,
        dataset={"image_transform": image_number, "text_transform": text_number, "seed": 1, "shuffle": 10},
        loader={"batch_size": 5, "score_batch_size": 4},
    )
    return recipe.but(threshold=threshold_that_keeps(0.5, score_by_key(recipe)))


def check_complete(recipe: Recipe, record: Path, scores: Path) -> None:
    """The record holds what `score` writes, and nothing else."""
    files = {path.relative_to(record).as_posix() for path in record.rglob("*") if path.is_file()}
    assert files == {f"{Path(url).stem}.parquet" for url in expand_shards(recipe.shards)}
    recorded, made = ScoreFolder(record), ScoreFolder(scores)
    assert recorded.fingerprint == made.fingerprint
    for url in expand_shards(recipe.shards):
        ours, theirs = recorded.read(url), made.read(url)
        for name in ("shard", "identity", "torn"):
            assert getattr(ours.metadata, name) == getattr(theirs.metadata, name)
        assert ours.table.drop_columns("score").equals(theirs.table.drop_columns("score"))
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)


@pytest.fixture(scope="module")
def tables(scored, tmp_path_factory) -> Path:
    return write_scores(scored, tmp_path_factory.mktemp("scores"))


# --- the same batches, at no cost ---


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 3, "persistent_workers": True}, {"threshold": None}],
    ids=str,
)
def test_what_the_first_epoch_recorded_the_later_ones_do_not_score(scored, tables, tmp_path, options, counted):
    plain, recording = scored.but(**options), scored.but(record=tmp_path / "record", **options)
    loader = recording.build()
    ours, rows = [], []
    for _ in range(3):
        ours += [{**batch, "score": batch["score"].numpy()} for batch in loader]
        rows.append(counted.take())
    assert rows[1:] == [0, 0]
    assert rows[0] >= NUM_USABLE
    check_complete(scored, tmp_path / "record", tables)
    check_same((ours, loader.stats, 0), batches(plain, 3))
    counted.take()
    check_same(batches(recording), batches(plain))
    assert counted.take() <= 2 * rows[0]  # of the plain one only
    check_same(batches(scored.from_table(tmp_path / "record").but(**options)), batches(plain))


def test_images_that_are_recorded_as_dropped_are_not_decoded_again(scored, tmp_path, monkeypatch):
    loader = scored.build(record=tmp_path)
    first = keys(loader)
    decoded = []
    original = preprocess.ImageView.decode
    monkeypatch.setattr(preprocess.ImageView, "decode", lambda view, data: decoded.append(data) or original(view, data))
    second = keys(loader)
    assert len(decoded) == len(flat(second)) == len(flat(first))


def test_what_was_scored_ahead_of_training_is_not_scored_again(scored, tables, counted):
    recording = scored.but(record=tables)
    check_same(batches(recording), batches(scored))
    counted.take()
    keys(recording.build())
    assert counted.take() == 0


def test_an_endless_stream_uses_what_it_recorded(scored, tmp_path, counted):
    options = {"end": "repeat", "batches_per_epoch": 6, "num_workers": 2}
    recording = scored.but(record=tmp_path, **options)
    check_same(batches(recording, 4), batches(scored.but(**options), 4))
    counted.take()
    keys(recording.build(), 2)
    assert counted.take() == 0


def run_epochs(recipes: list[Recipe], num_epochs: int):
    """What a rank gets from each, and how many rows it scored in each epoch."""
    outcomes = []
    with CountedRows(load_scorer(recipes[0].clip)) as rows:
        for recipe in recipes:
            loader = recipe.build()
            epochs = [([batch["__key__"] for batch in loader], rows.take()) for _ in range(num_epochs)]
            outcomes.append((epochs, loader.stats))
    return outcomes


def test_ranks_record_for_one_another(scored, tables, tmp_path):
    recipe = scored.but(batch_size=3, threshold=None)
    by_rank = run_ranks(2, run_epochs, [recipe.but(record=tmp_path), recipe], 3)
    recorded = [ours for ours, _ in by_rank]
    for (ours, our_stats), (theirs, their_stats) in by_rank:
        assert [epoch for epoch, _ in ours] == [epoch for epoch, _ in theirs]
        assert our_stats == their_stats
    rows_by_epoch = [sum(rows) for rows in zip(*([rows for _, rows in ours] for ours, _ in recorded), strict=True)]
    # What is left over when an epoch ends may not be scored in it, or be scored while the other rank begins the next.
    num_ahead = 2 * 3 * 4
    assert NUM_USABLE - num_ahead <= sum(rows_by_epoch) <= NUM_USABLE + num_ahead
    assert rows_by_epoch[2] <= num_ahead
    keys(recipe.build(record=tmp_path))
    check_complete(scored, tmp_path, tables)


# --- a record that is not complete ---


def test_a_run_that_stopped_is_used_as_far_as_it_went(scored, tables, tmp_path, counted):
    recording = scored.but(record=tmp_path)
    stopped = recording.build()
    for _ in islice(stopped, 2):
        pass
    first = counted.take()
    assert list((tmp_path / "_parts").rglob("*.parquet"))
    check_same(batches(recording, 1), batches(scored, 1))
    both = counted.take()
    assert 0 < first < NUM_USABLE
    assert both == (NUM_USABLE - first) + NUM_USABLE
    check_complete(scored, tmp_path, tables)


def test_resumes_within_an_epoch_with_what_was_recorded(scored, tmp_path):
    whole = keys(scored.build(), 2)
    recording = scored.but(record=tmp_path)
    for batches_before in range(len(whole[0])):
        loader = recording.build()
        begun = [batch["__key__"] for batch in islice(loader, batches_before)]
        resumed = recording.build()
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert [begun + keys(resumed)[0], *keys(resumed)] == whole


def test_resumes_after_every_batch(scored, tmp_path):
    check_restores_after_every_batch(scored.but(record=tmp_path / "in", batch_size=9))


@pytest.mark.slow
def test_resumes_after_every_batch_on_two_ranks_with_workers(scored, tmp_path):
    recipe = scored.but(record=tmp_path / "in", batch_size=20, num_workers=2)
    check_restores_after_every_batch(recipe, world_size=2)


def test_a_run_that_was_killed_leaves_whole_tables_only(clip_folder, tmp_path, counted):
    shards = write_numbered(tmp_path / "in", [[1000 * shard + n for n in range(6)] for shard in range(40)])
    recipe = Recipe(clip=clip_folder, shards=shards, loader={"threshold": None, "record": tmp_path / "record"})
    train_until_killed(recipe, tmp_path / "record", 5)
    num_whole = len(list((tmp_path / "record").glob("*.parquet")))
    assert num_whole >= 5
    assert sorted(flat(keys(recipe.build()))) == [f"{1000 * shard + n:09d}" for shard in range(40) for n in range(6)]
    assert counted.take() <= 6 * (40 - num_whole)
    assert {path.name for path in (tmp_path / "record").iterdir()} == {
        "_parts",
        *(f"{n:05d}.parquet" for n in range(40)),
    }


def test_a_sample_that_was_recorded_twice_counts_once(scored, tmp_path):
    record = RecordFolder.open(tmp_path, expand_shards(scored.shards), {"weights": "a"}, threshold=0.5)
    url = expand_shards(scored.shards)[0]
    rows = [SampleRow(f"{number:09d}", number) for number in range(12)]
    for part in (rows[:7], rows[5:], rows[6:8]):
        record.add_part(url, SampleRows.of(part), np.full(len(part), 0.5, dtype=np.float32), identity=ShardIdentity(5))
    record.add_end(url, ShardEnd(num_samples=12, torn=False, num_bytes=5))
    table = ShardScores.read(record.table(url))
    assert table.table["index"].to_pylist() == list(range(12))
    assert table.keys == [row.key for row in rows]


@pytest.mark.parametrize(
    ("threshold", "scored_again"), [(0.25, set()), (0.26, {2, 3}), (0.4, {4}), (0.0, set()), (None, set())]
)
@pytest.mark.parametrize("is_whole", [False, True])
def test_low_precision_decides_only_where_it_was_recorded_for(scored, tmp_path, threshold, scored_again, is_whole):
    url = expand_shards(scored.shards)[0]
    record = RecordFolder.open(tmp_path, [url], {"weights": "a"}, threshold=0.25)
    rows = [*(SampleRow(str(number), number) for number in range(5)), SampleRow("5", 5, DropReason.BLANK_CAPTION)]
    scores = np.array([0.1, 0.2, 0.245, 0.262, 0.395], dtype=np.float32)
    num_bytes = Path(url).stat().st_size
    record.add_part(url, SampleRows.of(rows), scores, identity=ShardIdentity(num_bytes), band=0.02)
    if is_whole:
        record.add_end(url, ShardEnd(num_samples=6, torn=False, num_bytes=num_bytes))
    assert record.table(url).exists() == is_whole
    lookup = RecordLookup(record=RecordFolder.open(tmp_path, [url], {"weights": "a"}, threshold=threshold))
    assert set(range(6)) - set(lookup(url).samples) == scored_again


# --- what does not fit ---


def test_a_shard_that_no_table_can_be_named_after_is_trained_on_and_not_recorded(scored, tmp_path, caplog, counted):
    write_numbered(tmp_path / "in", [[1, 2, 3], [4, 5, 6]])
    (tmp_path / "in" / "00000.tar").rename(tmp_path / "in" / f"{'x' * 240}.tar")
    (tmp_path / "in" / "00001.tar").rename(tmp_path / "in" / f"{'y' * 237}.tar")
    loader = {"threshold": None, "record": tmp_path / "record", "batch_size": 4}
    recipe = Recipe(clip=scored.clip, shards=f"{tmp_path}/in/*.tar", loader=loader)
    assert [sorted(flat(keys(recipe.build()))) for _ in range(2)] == [[f"{n:09d}" for n in range(1, 7)]] * 2
    assert counted.take() == 6 + 3
    assert {path.name for path in (tmp_path / "record").glob("*.parquet")} == {f"{'y' * 237}.parquet"}
    assert "scores of a shard are not recorded: " in caplog.text


def test_a_record_of_another_model_is_refused_with_both_values(scored, tmp_path):
    keys(scored.build(record=tmp_path / "record"))
    other = Recipe(clip=make_clip(tmp_path / "clip", seed=1), shards=scored.shards, loader=scored.loader)
    with pytest.raises(ValueError, match=r"the record '.*00000\.parquet' was written with .*weights .* there, .* here"):
        other.build(record=tmp_path / "record")


def test_a_record_of_a_shard_that_was_replaced_is_refused_with_both_sizes(scored, tmp_path):
    shards = write_numbered(tmp_path / "in", [[1, 2, 3]])
    recipe = Recipe(clip=scored.clip, shards=shards, loader={"threshold": None, "record": tmp_path / "record"})
    keys(recipe.build())
    write_numbered(tmp_path / "in", [list(range(50))])
    with pytest.raises(ValueError, match=r"\d+ bytes here, \d+ in '.*00000\.parquet'; delete that file"):
        keys(recipe.build())


def test_a_record_needs_a_model_and_shards_and_a_folder(scored, tables, tmp_path):
    with pytest.raises(ValueError, match="there is no scorer whose scores could be recorded"):
        scored.from_table(tables).build(record=tmp_path)
    with pytest.raises(ValueError, match="goes with a ClipWebDataset only"):
        ClipFilterLoader([{}], load_scorer(scored.clip), record=tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"can't write to record '.*file'"):
        scored.build(record=tmp_path / "file")
    with pytest.raises(ValueError, match="is no local folder"):
        scored.build(record="s3://bucket/record")


def test_training_continues_when_the_record_can_no_longer_be_written(scored, tmp_path, caplog):
    plain = keys(scored.build(), 2)
    loader = scored.build(record=tmp_path)
    (tmp_path / "_parts").write_bytes(b"in the way")
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        assert keys(loader, 2) == plain
    assert sum("no longer recorded" in record.getMessage() for record in caplog.records) == 1
