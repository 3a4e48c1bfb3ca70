"""Training from a score table: no model, dropped samples not decoded, and the batches that the model would give."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.preprocess import image as preprocess
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.types import DropReason
from tests.support.batches import batches, check_same, write_mixed, write_scores
from tests.support.pace import FOREVER
from tests.support.processes import run_ranks
from tests.support.restore import (
    Recipe,
    check_restores_after_every_batch,
    flat,
    image_number,
    keys,
    load_scorer,
    numbered_pair,
    score_by_key,
    text_number,
    threshold_that_keeps,
    write_numbered,
)
from tests.support.score_tables import derive
from tests.support.toys import make_clip, write_shard


@pytest.fixture(scope="module")
def scored(clip_folder, tmp_path_factory) -> Recipe:
    """A loader that scores, and keeps half of the samples."""
    recipe = Recipe(
        clip=clip_folder,
        shards=write_mixed(tmp_path_factory.mktemp("shards")),
        dataset={"image_transform": image_number, "text_transform": text_number, "seed": 1, "shuffle": 10},
        loader={"batch_size": 5, "score_batch_size": 4},
    )
    return recipe.but(threshold=threshold_that_keeps(0.5, score_by_key(recipe)))


@pytest.fixture(scope="module")
def tabled(scored, tmp_path_factory) -> Recipe:
    """The same loader from a table."""
    return scored.from_table(write_scores(scored, tmp_path_factory.mktemp("scores")))


# --- the same batches ---


@pytest.mark.parametrize(
    ("options", "shuffle", "share"),
    [
        *(({}, 0, share) for share in (0.02, 0.5, 1.0)),
        *(({"batch_size": 3, "score_batch_size": 16}, 10, share) for share in (0.02, 0.5, 1.0)),
        ({"num_workers": 3}, 10, 0.5),
        ({"num_workers": 2, "persistent_workers": True}, 100, 0.5),
        pytest.param({"num_workers": 11, "batch_size": 1, "drop_last": True}, 10, 0.5, marks=pytest.mark.slow),
        ({"num_workers": 2, "end": "repeat", "batches_per_epoch": 7}, 10, 0.02),
        ({"num_workers": 2, "end": "repeat", "batches_per_epoch": 7}, 10, 0.5),
    ],
    ids=str,
)
def test_a_table_gives_the_same_batches_in_the_same_order_as_the_model(scored, tabled, options, shuffle, share):
    threshold = threshold_that_keeps(share, score_by_key(scored))
    recipes = [
        recipe.but(threshold=threshold, **{"batch_size": 2, **options}).but_dataset(shuffle=shuffle)
        for recipe in (tabled, scored)
    ]
    ours, theirs = map(batches, recipes)
    check_same(ours, theirs)
    stats = ours[1]
    assert stats.seen == stats.kept + sum(stats.dropped.values())
    if "end" not in options:
        assert set(stats.dropped) >= {DropReason.BLANK_CAPTION, DropReason.UNREADABLE_IMAGE, DropReason.TORN}


def test_without_transforms_and_threshold_the_table_gives_what_the_model_gives(scored, tabled):
    plain = {"image_transform": None, "text_transform": None}
    check_same(*(batches(r.but(threshold=None).but_dataset(**plain)) for r in (tabled, scored)))


@pytest.mark.parametrize("end", [{}, {"end": "repeat", "batches_per_epoch": 4}], ids=["sync", "repeat"])
def test_ranks_get_the_same_from_a_table_as_from_the_model(scored, tabled, end):
    recipes = [recipe.but(batch_size=2, **end) for recipe in (tabled, scored)]
    for ours, theirs in run_ranks(2, all_batches, recipes):
        check_same(ours, theirs)


def all_batches(recipes):
    return [batches(recipe) for recipe in recipes]


def test_shards_and_tables_may_have_moved(scored, tabled, tmp_path):
    shutil.copytree(Path(scored.shards).parent, tmp_path / "data")
    shutil.copytree(tabled.scores, tmp_path / "copied" / "_scores")
    (tmp_path / "data/00006.tar").unlink()  # could not be scored, and only its old place tells so
    moved = Recipe(clip=scored.clip, shards=f"{tmp_path}/data/*.tar", dataset=scored.dataset, loader=scored.loader)
    check = [keys(recipe.build()) for recipe in (moved.from_table(tmp_path / "copied"), moved)]
    assert check[0] == check[1] != [[]]


def test_scores_of_another_kind_decide_as_they_are(tabled, tmp_path):
    folder = shutil.copytree(tabled.scores, tmp_path / "losses")
    derive(folder, "loss", lambda cosines: 3 * (cosines - np.float32(0.5)), limits=(None, 0.0))
    losses = tabled.from_table(folder)
    with pytest.raises(ValueError, match="a score of kind 'loss' lies in"):
        losses.but(threshold=0.25).build()
    with pytest.raises(ValueError, match="of kind 'loss', which has no usual threshold"):
        ClipFilterLoader(ClipWebDataset(losses.shards), ScoreFolder(folder))
    found = {
        key: score
        for table in map(ShardScores.read, folder.rglob("*.parquet"))
        for key, score, usable in zip(table.keys, table.scores.tolist(), table.usable, strict=True)
        if usable
    }
    threshold = sorted(found.values())[len(found) // 2]
    assert threshold < 0
    loader = losses.but(threshold=threshold).build()
    assert sorted(flat(keys(loader))) == sorted(key for key, score in found.items() if score >= threshold)


# --- what it does not do ---


def test_only_images_that_are_kept_are_decoded(scored, tabled, monkeypatch):
    decoded = []
    original = preprocess.ImageView.decode
    monkeypatch.setattr(preprocess.ImageView, "decode", lambda view, data: decoded.append(data) or original(view, data))
    loader = tabled.build()
    handed = flat(keys(loader))
    assert len(decoded) == len(handed) == loader.stats.kept < loader.stats.seen / 2
    decoded.clear()
    keys(scored.build())
    assert len(decoded) > len(handed)


FROM_TABLE = """
import sys
from clipfilter_wds import ClipFilterLoader, ClipWebDataset, ScoreFolder

shards, scores, threshold = sys.argv[1:]
loader = ClipFilterLoader(ClipWebDataset(shards), ScoreFolder(scores), threshold=float(threshold))
for batch in loader:
    print(*batch["__key__"])
assert "transformers" not in sys.modules
"""


def test_no_model_and_no_library_of_models_is_loaded(tabled):
    threshold = tabled.loader["threshold"]
    command = [sys.executable, "-c", FROM_TABLE, tabled.shards, tabled.scores, str(threshold)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=FOREVER)
    assert done.stdout.split() == flat(keys(tabled.but_dataset(shuffle=0).build()))


# --- resume ---


@pytest.mark.parametrize(
    ("options", "world_size"),
    [
        ({"num_workers": 0}, 1),
        pytest.param({"num_workers": 2, "batch_size": 13}, 1, marks=pytest.mark.slow),
        pytest.param({"num_workers": 0, "end": "repeat", "batches_per_epoch": 3}, 1, marks=pytest.mark.slow),
        pytest.param({"num_workers": 0, "batch_size": 3}, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resumes_after_every_batch(tabled, options, world_size):
    check_restores_after_every_batch(tabled.but(**options), world_size=world_size)


def test_a_run_that_scored_resumes_from_a_table_and_the_other_way_round(scored, tabled):
    whole = keys(scored.build())[0]
    for first, second in ((scored, tabled), (tabled, scored)):
        loader = first.build()
        begun = [batch["__key__"] for batch in islice(loader, 2)]
        resumed = second.build()
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert begun + keys(resumed)[0] == whole


def test_a_state_of_other_scores_is_refused_with_both_values(tabled, tmp_path):
    state = tabled.build().state_dict()
    other = Recipe(clip=make_clip(tmp_path / "clip", seed=1), shards=tabled.shards, loader=tabled.loader)
    loader = tabled.from_table(write_scores(other, tmp_path / "scores")).build()
    with pytest.raises(ValueError, match=r"weights is '.*' here and '.*' in the state"):
        loader.load_state_dict(state)


# --- what does not fit ---


def test_a_shard_that_could_not_be_scored_is_left_out_with_the_reason(tabled, caplog):
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        keys(tabled.build(), 2)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "00006.tar" in warnings[0]
    assert "could not be scored: it is not a tar archive" in warnings[0]


def test_a_shard_without_scores_is_refused_before_training(tabled, tmp_path):
    shard = write_shard(tmp_path / "9.tar", [numbered_pair(1)])
    with pytest.raises(ValueError, match=r"1 of 8 shards have no score table in .*, the first is .*9\.tar"):
        ClipFilterLoader(ClipWebDataset([tabled.shards, shard]), ScoreFolder(tabled.scores))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (SampleLayout(caption="json:caption"), "caption txt there, json:caption here"),
        (SampleLayout(image="png"), "image null there, png here"),
    ],
)
def test_scores_of_other_captions_or_images_are_refused_with_both(tabled, layout, message):
    with pytest.raises(ValueError, match=message):
        ClipFilterLoader(ClipWebDataset(tabled.shards, layout=layout), ScoreFolder(tabled.scores))


def test_scores_of_a_named_image_are_refused_for_the_usual_one(scorer, tmp_path):
    shard = write_shard(tmp_path / "0.tar", [numbered_pair(1)])
    process_shards(ScoreConfig(shards=shard, output=tmp_path / "scores", image="jpg", num_workers=0), scorer)
    with pytest.raises(ValueError, match="image jpg there, null here"):
        ClipFilterLoader(ClipWebDataset(shard), ScoreFolder(tmp_path / "scores"))


def rewritten_table(folder: Path, name: str, change) -> None:
    path = folder / f"{name}.parquet"
    found = ShardScores.read(path)
    table = change(found.table)
    metadata = replace(found.metadata, num_samples=table.num_rows)
    with path.open("wb") as file:
        ShardScores(table=table, metadata=metadata).write(file)


def renamed_key(table):
    keys = table["key"].to_pylist()
    return table.set_column(0, "key", [[*keys[:5], "someone", *keys[6:]]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table.slice(0, 11),
            r"00000\.tar is not the shard that was scored: sample 11 is .* there is none",
        ),
        (renamed_key, r"00000\.tar is not .*: sample 5 is '000000005' here, it is 'someone' among the scores"),
        (lambda table: table.slice(1), r"lacks samples"),
    ],
    ids=["fewer", "key", "gap"],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_scores_of_another_shard_of_the_same_size_stop_training(tabled, tmp_path, change, message, num_workers):
    shutil.copytree(tabled.scores, tmp_path / "scores")
    rewritten_table(tmp_path / "scores", "00000", change)
    loader = tabled.from_table(tmp_path / "scores").build(threshold=None, num_workers=num_workers)
    with pytest.raises(ValueError, match=message):
        keys(loader)


def test_more_scores_than_samples_stop_training(scored, tmp_path):
    shards = write_numbered(tmp_path / "in", [[1, 2, 3]])
    scores = write_scores(Recipe(clip=scored.clip, shards=shards), tmp_path / "scores")
    rewritten_table(scores, "00000", lambda table: _longer(table))
    loader = ClipFilterLoader(ClipWebDataset(shards), ScoreFolder(scores), threshold=None)
    with pytest.raises(ValueError, match=r"3 samples here, 4 samples among the scores"):
        keys(loader)


def _longer(table):
    rows = table.to_pylist()
    return type(table).from_pylist([*rows, {**rows[-1], "key": "x", "index": 3}], schema=table.schema)


def test_a_shard_that_was_replaced_stops_training_with_both_sizes(scored, tmp_path):
    shards = write_numbered(tmp_path / "in", [[1, 2, 3]])
    scores = write_scores(Recipe(clip=scored.clip, shards=shards), tmp_path / "scores")
    loader = ClipFilterLoader(ClipWebDataset(shards), ScoreFolder(scores), threshold=None)
    write_numbered(tmp_path / "in", [list(range(50))])
    with pytest.raises(ValueError, match=r"00000\.tar: it is not the shard that was scored: \d+ bytes here, \d+ in"):
        keys(loader)


def test_a_table_needs_shards_and_a_model_needs_a_preprocess(scored, tabled):
    with pytest.raises(ValueError, match="goes with a ClipWebDataset"):
        ClipFilterLoader([{"pixel_values": 0}], ScoreFolder(tabled.scores))
    with pytest.raises(ValueError, match="the dataset has no preprocess"):
        ClipFilterLoader(ClipWebDataset(scored.shards), load_scorer(scored.clip))
    with pytest.raises(ValueError, match="the dataset has no preprocess"):
        next(iter(ClipWebDataset(scored.shards)))


def test_shards_that_keep_nothing_end_in_an_error_that_tells_the_scores(tabled):
    with pytest.raises(StarvationError, match=r"threshold is 0\.9") as by_table:
        keys(tabled.build(threshold=0.9))
    assert "quantiles" in str(by_table.value) or "highest" in str(by_table.value)
