import json
import logging
import os
import signal
import threading
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.types import DropReason, Sample
from clipfilter_wds.world import World
from tests.support.processes import in_fresh_process
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
from tests.support.toys import make_clip, tar_members, write_shard

NUMBERS = [[1000 * shard + number for number in range(12)] for shard in range(4)]


@pytest.fixture(scope="module")
def all_samples(clip_folder, tmp_path_factory) -> Recipe:
    """A loader that keeps everything, in order."""
    return Recipe(
        clip=clip_folder,
        shards=write_numbered(tmp_path_factory.mktemp("loader"), NUMBERS),
        dataset={"image_transform": image_number, "text_transform": text_number, "seed": 1},
        loader={"threshold": None, "batch_size": 5, "score_batch_size": 4},
    )


@pytest.fixture(scope="module")
def scores(all_samples) -> dict[str, float]:
    return score_by_key(all_samples)


@pytest.fixture(scope="module")
def half(all_samples, scores) -> Recipe:
    """A loader that keeps half of the samples, in order."""
    return all_samples.but(threshold=threshold_that_keeps(0.5, scores))


def expected_keys(recipe, scores):
    threshold = recipe.loader["threshold"]
    return sorted(key for key, score in scores.items() if min(max(score, 0.0), 1.0) >= threshold)


# --- what is kept, and how it is packed ---


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize(
    ("batch_size", "score_batch_size", "num_workers", "shuffle"),
    [(1, 7, 0, 0), (5, 4, 0, 10), (7, 1, 0, 100), (4, 64, 2, 10), (100, 3, 0, 0)],
)
def test_batches_have_one_size_and_the_columns_of_a_row_belong_together(
    all_samples, scores, share, batch_size, score_batch_size, num_workers, shuffle
):
    recipe = all_samples.but(
        threshold=threshold_that_keeps(share, scores),
        batch_size=batch_size,
        score_batch_size=score_batch_size,
        num_workers=num_workers,
    ).but_dataset(shuffle=shuffle)
    batches = list(recipe.build())
    kept = expected_keys(recipe, scores)
    assert len(kept) == max(round(48 * share), 1)
    assert sorted(key for batch in batches for key in batch["__key__"]) == kept
    sizes = [len(batch["__key__"]) for batch in batches]
    assert sizes == [batch_size] * (len(kept) // batch_size) + [len(kept) % batch_size] * (len(kept) % batch_size > 0)
    for batch in batches:
        numbers = [int(key) for key in batch["__key__"]]
        assert batch["image"].tolist() == batch["text"].tolist() == numbers
        assert [int(Path(url).stem) for url in batch["__url__"]] == [number // 1000 for number in numbers]
        assert batch["score"].dtype is torch.float32
        assert batch["score"].shape == (len(numbers),)
        assert batch["score"].tolist() == pytest.approx([scores[key] for key in batch["__key__"]], abs=1e-6)
    dropped_last = list(recipe.but(drop_last=True).build())
    assert [b["__key__"] for b in dropped_last] == [b["__key__"] for b in batches if len(b["__key__"]) == batch_size]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_keeps_exactly_the_samples_that_rewrite_keeps(half, tmp_path, num_workers):
    config = RewriteConfig(
        shards=half.shards, output=tmp_path / "out", threshold=half.loader["threshold"], batch_size=16, num_workers=0
    )
    process_shards(config, load_scorer(half.clip))
    rewritten = {name.split(".")[0] for tar in (tmp_path / "out").glob("*.tar") for name, _ in tar_members(tar)}
    loader = half.build(num_workers=num_workers)
    inline = flat(keys(loader))
    assert sorted(inline) == sorted(rewritten)
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert (loader.stats.seen, loader.stats.kept) == (summary["seen"], summary["kept"])
    assert {str(reason): count for reason, count in loader.stats.dropped.items()} == summary["dropped"]


def test_without_threshold_every_usable_sample_comes_with_its_score(all_samples, tmp_path):
    good = numbered_pair(5)
    samples = [good, {"png": good["png"]}, {**good, "txt": b" "}, {**good, "png": b"\x89PNG"}, good]
    url = str(write_shard(tmp_path / "mixed.tar", samples))
    recipe = Recipe(clip=all_samples.clip, shards=[url], loader=all_samples.loader)
    loader = recipe.build()
    (batch,) = list(loader)
    assert batch["__key__"] == ["000000000", "000000004"]
    assert batch["score"][0] == batch["score"][1] != 0
    reasons = (DropReason.MISSING_CAPTION, DropReason.BLANK_CAPTION, DropReason.UNREADABLE_IMAGE)
    assert loader.stats.dropped == dict.fromkeys(reasons, 1)
    assert (loader.stats.seen, loader.stats.kept) == (5, 2)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_bad_shards_among_good_are_warned_of_once_and_the_accounting_closes(all_samples, tmp_path, caplog, num_workers):
    write_numbered(tmp_path, NUMBERS[:3])
    (tmp_path / "00003.tar").write_bytes(b"garbage" * 1000)
    torn = write_shard(tmp_path / "00004.tar", [numbered_pair(number) for number in range(6)], start=4000)
    torn.write_bytes(torn.read_bytes()[:-11_000])  # the end mark, its padding and the last caption
    (tmp_path / "00005.tar").write_bytes(b"")
    recipe = Recipe(clip=all_samples.clip, shards=f"{tmp_path}/*.tar", loader=all_samples.loader)
    loader = recipe.build(num_workers=num_workers)
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        read = [int(key) for key in flat(keys(loader))]
    cut = loader.stats.dropped[DropReason.TORN]
    assert cut == 1
    assert sorted(read) == [*NUMBERS[0], *NUMBERS[1], *NUMBERS[2], *range(4000, 4000 + loader.stats.kept - 36)]
    assert loader.stats.kept >= 40
    assert loader.stats.seen == loader.stats.kept + sum(loader.stats.dropped.values())
    warnings = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(warnings) == 1
    assert "00003.tar" in warnings[0]
    assert "not a tar archive" in warnings[0]


def test_a_shard_that_workers_share_is_warned_of_once(all_samples, tmp_path, caplog):
    write_numbered(tmp_path, NUMBERS[:2])
    (tmp_path / "0000.tar").write_bytes(b"garbage" * 1000)  # the first of three shards for four workers
    recipe = Recipe(clip=all_samples.clip, shards=f"{tmp_path}/*.tar", loader=all_samples.loader)
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        assert len(flat(keys(recipe.build(num_workers=4)))) == 24
    assert sum("left out" in record.getMessage() for record in caplog.records) == 1


# --- epochs ---


@pytest.mark.parametrize(
    ("context", "num_workers", "shuffle"),
    [
        (None, 0, 0),
        (None, 0, 10),
        ("fork", 1, 10),
        ("fork", 3, 0),
        ("fork", 6, 10),
        pytest.param("spawn", 1, 10, marks=pytest.mark.slow),
        pytest.param("spawn", 3, 10, marks=pytest.mark.slow),
        ("forkserver", 2, 10),
        pytest.param("forkserver", 3, 10, marks=pytest.mark.slow),
    ],
)
def test_several_epochs_give_every_sample_once_an_epoch(half, scores, context, num_workers, shuffle):
    quick = context in (None, "fork")
    loader = half.but_dataset(shuffle=shuffle).build(num_workers=num_workers, multiprocessing_context=context)
    epochs = keys(loader, 3 if quick else 2)
    for epoch in epochs:
        assert sorted(flat([epoch])) == expected_keys(half, scores)
    assert (epochs[0] != epochs[1]) == bool(shuffle)
    assert loader.stats.seen == 48 * len(epochs)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_epochs_follow_one_another_and_set_epoch_gives_each_again(half, num_workers):
    recipe = half.but(num_workers=num_workers).but_dataset(shuffle=10)
    epochs = keys(recipe.build(), 3)
    loader = recipe.build()
    for epoch in (2, 0, 1):
        loader.set_epoch(epoch)
        assert keys(loader) == [epochs[epoch]]


def test_after_a_break_comes_the_next_epoch(half):
    recipe = half.but_dataset(shuffle=10)
    epochs = keys(recipe.build(), 2)
    loader = recipe.build()
    for _ in loader:
        break
    assert keys(loader) == [epochs[1]]


def test_set_epoch_after_a_break_is_the_beginning_that_the_state_says(half):
    recipe = half.but_dataset(shuffle=10)
    epochs = keys(recipe.build(), 2)
    loader = recipe.build()
    iterator = iter(loader)  # kept, as Lightning keeps it
    assert len(list(islice(iterator, 2))) == 2
    loader.set_epoch(1)
    loader.load_state_dict(loader.state_dict())
    assert keys(loader) == [epochs[1]]


@pytest.mark.parametrize("shuffle", [0, 10])
def test_persistent_workers_stay_and_give_the_same_epochs(half, shuffle):
    usual = half.but_dataset(shuffle=shuffle).but(num_workers=2).build()
    staying = half.but_dataset(shuffle=shuffle).but(num_workers=2, persistent_workers=True).build()
    workers = []
    for taken in (None, 2, None, 0, None):  # whole epochs, and some that are broken off
        epochs = []
        for loader in (usual, staying):
            epochs.append([batch["__key__"] for batch in islice(loader, taken)])
        assert epochs[0] == epochs[1]
        workers.append({child.pid for child in psutil.Process().children() if child.name() == "pt_data_worker"})
    assert workers[0] == workers[-1] != set()


def test_another_seed_is_another_order(half):
    orders = [keys(half.but_dataset(shuffle=10, seed=seed).build()) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [5, 8, 1000])
def test_stats_count_every_sample_of_every_epoch(half, batch_size, drop_last):
    loader = half.but_dataset(shuffle=10).build(batch_size=batch_size, drop_last=drop_last)
    for epoch in range(1, 4):
        keys(loader)
        assert (loader.stats.seen, loader.stats.kept) == (48 * epoch, 24 * epoch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_repeat_goes_on_for_ever_in_batches_of_one_size(half, scores, num_workers):
    loader = half.but_dataset(shuffle=10).build(num_workers=num_workers, end="repeat", batches_per_epoch=7)
    assert len(loader) == 7
    epochs = keys(loader, 5)
    assert [len(epoch) for epoch in epochs] == [7] * 5
    assert {len(batch) for epoch in epochs for batch in epoch} == {5}
    stream = flat(epochs)
    # 175 of an endless stream that gives each of the 24 kept samples once in every 24.
    if num_workers == 0:
        for first in range(0, 168, 24):
            assert sorted(stream[first : first + 24]) == expected_keys(half, scores)
    assert {stream.count(key) for key in expected_keys(half, scores)} <= {6, 7, 8, 9}


def test_how_long_an_epoch_is_is_not_known_beforehand(half):
    with pytest.raises(TypeError, match="not known beforehand"):
        len(half.build())


def test_an_incomplete_last_batch_is_no_left_over_of_a_lone_rank(half, caplog):
    loader = half.build(drop_last=True)
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        assert len(keys(loader)[0]) == 4
    assert loader.left_over == 0
    assert not caplog.records


# --- save and restore ---


@pytest.mark.parametrize(
    ("num_workers", "shuffle"),
    [
        (0, 0),
        (0, 10),
        (3, 10),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (1, 10), (2, 10), (3, 0), (6, 10))),
    ],
)
def test_goes_on_after_every_batch_in_a_fresh_process(half, num_workers, shuffle):
    check_restores_after_every_batch(half.but(num_workers=num_workers).but_dataset(shuffle=shuffle), num_epochs=2)


def test_goes_on_after_every_batch_with_one_worker(half):
    check_restores_after_every_batch(half.but(num_workers=1, batch_size=9).but_dataset(shuffle=10), num_epochs=2)


@pytest.mark.parametrize("num_workers", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {"end": "repeat", "batches_per_epoch": 4},
        {"batch_size": 3, "score_batch_size": 16},
        {"batch_size": 7, "score_batch_size": 1, "drop_last": True},
        pytest.param({"threshold": None, "batch_size": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_goes_on_after_every_batch_whatever_the_options(half, options, num_workers):
    recipe = half.but(num_workers=num_workers, **options).but_dataset(shuffle=10)
    check_restores_after_every_batch(recipe, num_epochs=3 if "end" in options else 2)


def test_goes_on_after_every_batch_around_bad_shards(half, tmp_path):
    write_numbered(tmp_path, NUMBERS[:2])
    (tmp_path / "00001b.tar").write_bytes(b"garbage" * 1000)
    torn = write_shard(tmp_path / "00000b.tar", [numbered_pair(number) for number in range(6)], start=4000)
    torn.write_bytes(torn.read_bytes()[:-11_000])
    recipe = Recipe(clip=half.clip, shards=f"{tmp_path}/*.tar", dataset={"shuffle": 10}, loader=half.loader)
    check_restores_after_every_batch(recipe)


def test_a_state_is_the_same_whether_the_loader_runs_on_or_not(half):
    recipe = half.but_dataset(shuffle=10)
    loader = recipe.build()
    running = [json.dumps(loader.state_dict())] + [json.dumps(loader.state_dict()) for _ in loader]
    for batches, state in enumerate(running):
        stopped = recipe.build()
        assert len(list(islice(stopped, batches))) == batches
        assert json.dumps(stopped.state_dict()) == state
    restored = recipe.build()
    for state in running:
        restored.load_state_dict(json.loads(state))
        assert json.dumps(restored.state_dict()) == state


def test_a_state_of_some_batches_back_is_the_state_of_then(half):
    loader = half.but_dataset(shuffle=10).build()
    states = [loader.state_dict()]
    for number, _ in enumerate(loader, start=1):
        states.append(loader.state_dict())
        for back in range(4):
            if number - back >= 0:
                assert loader.state_dict(after=number - back) == states[number - back]
    with pytest.raises(ValueError, match="the state after 99 batches is no longer known"):
        loader.state_dict(after=99)


def test_a_state_holds_positions_and_no_samples(half):
    loader = half.but(num_workers=3).but_dataset(shuffle=1000).build()
    next(iter(loader))
    assert len(json.dumps(loader.state_dict())) < 1500


@pytest.mark.parametrize(
    ("options", "dataset_options", "here", "there"),
    [
        ({"num_workers": 3}, {}, "num_workers is 3 here", "2 in the state"),
        ({"threshold": 0.2}, {}, "threshold is 0.2 here", "0.1 in the state"),
        ({"threshold": None}, {}, "threshold is None here", "0.1 in the state"),
        ({"batch_size": 6}, {}, "batch_size is 6 here", "5 in the state"),
        ({"score_batch_size": 6}, {}, "score_batch_size is 6 here", "4 in the state"),
        ({"end": "repeat", "batches_per_epoch": 3}, {}, "end is 'repeat' here", "'sync' in the state"),
        ({"world": World(rank=0, world_size=2)}, {}, "world_size is 2 here", "1 in the state"),
        ({"world": World(rank=1, world_size=2)}, {}, "rank is 1 here", "0 in the state"),
        ({}, {"shuffle": 3}, "shuffle is 3 here", "10 in the state"),
        ({}, {"seed": 2}, "seed is 2 here", "1 in the state"),
    ],
    ids=str,
)
def test_a_state_of_other_settings_is_refused_with_both_values(half, options, dataset_options, here, there):
    recipe = half.but(threshold=0.1, num_workers=2).but_dataset(shuffle=10)
    state = json.loads(json.dumps(recipe.build().state_dict()))
    with pytest.raises(ValueError, match="can't go on from this state") as refused:
        recipe.but(**options).but_dataset(**dataset_options).build().load_state_dict(state)
    assert here in str(refused.value)
    assert there in str(refused.value)


def test_a_state_of_another_dataset_model_or_version_is_refused_with_both_values(half, tmp_path):

    state = json.loads(json.dumps(half.build().state_dict()))
    other_shards = Recipe(clip=half.clip, shards=expand_shards(half.shards)[:3], loader=half.loader)
    with pytest.raises(ValueError, match=r"dataset is '3 shards, .*' here and '4 shards, .*' in the state"):
        other_shards.build().load_state_dict(state)
    other_model = Recipe(clip=make_clip(tmp_path / "other", seed=1), shards=half.shards, loader=half.loader)
    with pytest.raises(ValueError, match=r"weights is '.*' here and '.*' in the state"):
        other_model.build().load_state_dict(state)
    with pytest.raises(ValueError, match="the state has version 99, this version reads 1"):
        half.build().load_state_dict({**state, "version": 99})


def count_and_number(path, image):
    with Path(path).open("ab") as file:
        file.write(b".")
    return image_number(image)


def test_the_first_batch_after_a_resume_costs_the_same_wherever_it_was_stopped(clip_folder, tmp_path):
    num_shards, num_samples = 30, 20
    shards = write_numbered(
        tmp_path / "in", [[1000 * shard + n for n in range(num_samples)] for shard in range(num_shards)]
    )
    counter = tmp_path / "decoded"
    recipe = Recipe(
        clip=clip_folder,
        shards=shards,
        dataset={"image_transform": partial(count_and_number, counter), "shuffle": 50},
        loader={"threshold": 0.0, "batch_size": 8, "score_batch_size": 8},
    )
    loader = recipe.build()
    states = [loader.state_dict()] + [loader.state_dict() for _ in loader]
    shard_bytes = max(Path(url).stat().st_size for url in expand_shards(shards))
    for state in states[:-3:6]:
        resumed = recipe.build()
        resumed.load_state_dict(state)
        counter.write_bytes(b"")
        before = psutil.Process().io_counters().read_chars
        iterator = iter(resumed)
        next(iterator)
        iterator.close()
        num_bytes = psutil.Process().io_counters().read_chars - before
        assert counter.stat().st_size <= 5 * 8  # the first piece or two, two ahead and the one being made
        # Read again: up to the position in a shard, the window, what was decoded, and a look ahead.
        assert num_bytes <= shard_bytes * (50 / num_samples + 50 / num_samples + 40 / num_samples + 2)


# --- alarms ---


@pytest.mark.parametrize("options", [{}, {"end": "repeat", "batches_per_epoch": 3}, {"num_workers": 2}], ids=str)
def test_shards_without_survivor_end_in_an_explained_error(half, scores, options):
    loader = half.build(threshold=0.9, **options)
    with pytest.raises(StarvationError) as starved:
        keys(loader)
    message = str(starved.value)
    assert "threshold is 0.9" in message
    assert "Lower the threshold" in message
    median, highest = np.median(list(scores.values())), max(scores.values())
    if not options:
        assert f"50%: {median:.3f}" in message
        assert f"100%: {highest:.3f}" in message
        assert "a whole epoch of 48 samples left none" in message
        assert "last 48 scores" in message


def test_starvation_is_told_within_the_limit(half):
    loader = half.build(threshold=0.9, starvation_limit=10)
    with pytest.raises(StarvationError, match="the last 12 samples left none"):
        keys(loader)
    assert loader.stats.seen <= 12


def test_shards_of_unusable_samples_only_end_in_an_error(all_samples, tmp_path):
    url = str(write_shard(tmp_path / "blank.tar", [{**numbered_pair(1), "txt": b""}] * 10))
    with pytest.raises(StarvationError, match="No sample could be scored"):
        keys(Recipe(clip=all_samples.clip, shards=[url], loader=all_samples.loader).build())


def test_an_empty_tail_after_a_resume_is_no_starvation(half):
    loader = half.build()
    iterator = iter(loader)
    assert len(list(islice(iterator, 5))) == 5
    state = loader.state_dict()
    iterator.close()
    resumed = half.build()
    resumed.load_state_dict(state)
    assert keys(resumed, 2) == [[], keys(half.build())[0]]


def test_a_collapse_of_the_keep_rate_is_warned_of(clip_folder, scores, all_samples, tmp_path, caplog):
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    order = ranked[:24] * 20 + ranked[24:] * 20
    write_shard(tmp_path / "00000.tar", [numbered_pair(int(key)) for key in order])
    recipe = Recipe(clip=clip_folder, shards=f"{tmp_path}/*.tar", loader=all_samples.loader)
    threshold = threshold_that_keeps(0.5, scores)
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        keys(recipe.build(threshold=threshold))
    assert sum("has the data changed" in record.getMessage() for record in caplog.records) == 1


# --- other loaders ---


def columns_of(recipe, batch_size=6):
    """Batches that somebody else's loader might make."""
    preprocess = load_scorer(recipe.clip).preprocess

    opened = []
    for url in expand_shards(recipe.shards):
        with open_shard(url) as shard:
            opened += [sample for sample in read_samples(shard, SampleLayout()) if isinstance(sample, Sample)]
    batches = []
    for first in range(0, len(opened), batch_size):
        samples = opened[first : first + batch_size]
        pixels, ids = preprocess.collate([preprocess.open_sample(sample, SampleLayout()) for sample in samples])
        numbers = [int(sample.key) for sample in samples]
        batches.append(
            {
                "pixel_values": pixels,
                "input_ids": ids.input_ids,
                "number": torch.tensor(numbers),
                "meta": {"key": [sample.key for sample in samples], "pair": (torch.tensor(numbers), numbers)},
            }
        )
    return batches


def test_any_iterable_of_batches_is_filtered_with_all_its_columns(half, scores):
    batches = columns_of(half)
    threshold = half.loader["threshold"]
    loader = ClipFilterLoader(batches, load_scorer(half.clip), threshold=threshold, batch_size=5)
    for _ in range(2):
        kept = list(loader)
        assert [len(batch["number"]) for batch in kept] == [5, 5, 5, 5, 4]
        found = [key for batch in kept for key in batch["meta"]["key"]]
        assert found == expected_keys(half, scores)
        for batch in kept:
            numbers = batch["number"].tolist()
            assert [int(key) for key in batch["meta"]["key"]] == numbers
            assert batch["meta"]["pair"][0].tolist() == batch["meta"]["pair"][1] == numbers
            assert batch["score"].tolist() == pytest.approx([scores[k] for k in batch["meta"]["key"]], abs=1e-5)
            assert len(batch["pixel_values"]) == len(numbers)
    assert loader.stats.kept == 48


def test_a_batch_without_the_columns_to_score_is_refused_by_name(half):
    loader = ClipFilterLoader([{"pixel_values": torch.zeros(1), "text": ["x"]}], load_scorer(half.clip))
    with pytest.raises(ValueError, match=r"has the columns \['pixel_values', 'text'\], but no input_ids"):
        keys(loader)


def test_a_loader_of_any_iterable_cant_be_resumed_and_says_so(half):
    loader = ClipFilterLoader(columns_of(half), load_scorer(half.clip), threshold=None)
    with pytest.raises(ValueError, match="only a loader of a ClipWebDataset can be resumed"):
        loader.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 25}, "threshold is 25; a cosine lies in"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"score_batch_size": 0}, "score_batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"starvation_limit": 0}, "starvation_limit is 0"),
        ({"end": "stop"}, "end is 'stop'; use 'sync' or 'repeat'"),
        ({"end": "repeat"}, "'repeat' goes with it"),
        ({"batches_per_epoch": 3}, "'repeat' goes with it"),
        ({"end": "repeat", "batches_per_epoch": 0}, "batches_per_epoch is 0"),
    ],
)
def test_unusable_options_are_refused(half, options, message):
    with pytest.raises(ValueError, match=message):
        half.build(**options)


# --- clean shutdown ---


class Watched:
    """What this process had before: its processes, and its shared memory."""

    def __init__(self):
        self.children = set(psutil.Process().children(recursive=True))
        self.pids = {os.getpid()}

    def see_workers(self, num_workers):
        """Remember the workers, which have to be there."""
        workers = set(psutil.Process().children(recursive=True)) - self.children
        assert len(workers) == num_workers
        self.pids |= {worker.pid for worker in workers}

    def left(self):
        """Processes, threads and shared memory that were left behind."""
        children = set(psutil.Process().children(recursive=True)) - self.children
        shared = [path.name for path in Path("/dev/shm").glob("torch_*") if int(path.name.split("_")[1]) in self.pids]
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("clipfilter-")]
        return [*(f"{child.name()} {child.status()}" for child in children), *threads, *shared]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_left_after_an_epoch_or_a_break(half, num_workers):
    watched, loader = Watched(), half.build(num_workers=num_workers)
    for _ in loader:
        watched.see_workers(num_workers)
        break
    assert watched.left() == []
    keys(loader)
    assert watched.left() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_left_after_an_exception_in_the_training_loop(half, num_workers):
    watched, loader = Watched(), half.build(num_workers=num_workers)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012  # the loop is what is left by it
        for _ in loader:
            watched.see_workers(num_workers)
            raise ZeroDivisionError
    assert watched.left() == []


def fail_at(bad, image):
    number = image_number(image)
    if number == bad:
        raise LookupError(f"no label for {number}")
    return number


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_a_transform_surfaces_with_its_cause_and_leaves_nothing(half, num_workers):
    watched = Watched()
    loader = half.but_dataset(image_transform=partial(fail_at, 2005)).build(num_workers=num_workers)
    with pytest.raises(LookupError, match="no label for 2005") as raised:
        keys(loader)
    # The error is still held, as by a debugger or a log.
    assert watched.left() == []
    if num_workers:
        assert "in fail_at" in str(raised.value)


def test_nothing_is_left_when_the_error_of_a_worker_is_forgotten(half):
    watched = Watched()
    loader = half.but_dataset(image_transform=partial(fail_at, 2005)).build(num_workers=2)
    with suppress(LookupError):
        keys(loader)
    assert watched.left() == []


def test_nothing_is_left_after_starvation(half):
    watched, loader = Watched(), half.build(threshold=0.9, num_workers=2, starvation_limit=8)
    with pytest.raises(StarvationError):
        keys(loader)
    assert watched.left() == []


def test_nothing_is_left_after_many_quick_starts(half):
    watched, loader = Watched(), half.build(num_workers=1)
    for _ in range(3):
        next(iter(loader))
    num_files = psutil.Process().num_fds()
    for _ in range(30):
        for _ in loader:
            break
    assert watched.left() == []
    assert psutil.Process().num_fds() <= num_files


def interrupt_at(bad, image):
    """Ctrl-C, while the training loop waits for this sample."""
    if image_number(image) == bad:
        os.killpg(0, signal.SIGINT)
    return image_number(image)


def interrupted(recipe, num_workers, while_waiting):
    """What is left after Ctrl-C in the loop or while it waits; runs in a process group of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watched, loader = Watched(), recipe.build(num_workers=num_workers)
    was_interrupted = False
    try:
        for number, _ in enumerate(loader):
            if number == 0:
                watched.see_workers(num_workers)
            if not while_waiting:
                os.killpg(0, signal.SIGINT)
    except KeyboardInterrupt:
        was_interrupted = True
    return was_interrupted, watched.left()


@pytest.mark.parametrize("while_waiting", [False, True])
def test_nothing_is_left_after_ctrl_c(half, while_waiting):
    if while_waiting:
        half = half.but_dataset(image_transform=partial(interrupt_at, 2005))
    assert in_fresh_process(interrupted, half, 2, while_waiting) == (True, [])
