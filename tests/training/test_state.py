import json
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import pytest

from clipfilter_wds.shards.urls import expand_shards
from tests.support.restore import (
    NUMBERS,
    Recipe,
    check_restores_after_every_batch,
    image_number,
    numbered_pair,
    write_numbered,
)
from tests.support.toys import make_clip, write_shard


@pytest.mark.parametrize(
    ("num_workers", "shuffle"),
    [
        (0, 0),
        (0, 10),
        (3, 10),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (1, 10), (2, 10), (3, 0), (6, 10))),
    ],
)
def test_resumes_after_every_batch_in_a_fresh_process(half, num_workers, shuffle):
    check_restores_after_every_batch(half.but(num_workers=num_workers).but_dataset(shuffle=shuffle), num_epochs=2)


def test_resumes_after_every_batch_with_one_worker(half):
    check_restores_after_every_batch(half.but(num_workers=1, batch_size=9).but_dataset(shuffle=10), num_epochs=2)


@pytest.mark.parametrize("given", [{}, [{}], {"loader": {}}, [1], 5, None, "state.pt"], ids=str)
def test_what_is_no_state_is_told_from_one(half, given):
    with pytest.raises(TypeError, match=r"state_dict\(\) gave"):
        half.build().load_state_dict(given)


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
def test_resumes_after_every_batch_whatever_the_options(half, options, num_workers):
    recipe = half.but(num_workers=num_workers, **options).but_dataset(shuffle=10)
    check_restores_after_every_batch(recipe, num_epochs=3 if "end" in options else 2)


def test_resumes_after_every_batch_around_bad_shards(half, tmp_path):
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
        ({"num_streams": 3}, {}, "num_streams is 3 here", "None in the state"),
        ({"threshold": 0.2}, {}, "threshold is 0.2 here", "0.1 in the state"),
        ({"threshold": None}, {}, "threshold is None here", "0.1 in the state"),
        ({"batch_size": 6}, {}, "batch_size is 6 here", "5 in the state"),
        ({"score_batch_size": 6}, {}, "score_batch_size is 6 here", "4 in the state"),
        ({"end": "repeat", "batches_per_epoch": 3}, {}, "end is 'repeat' here", "'sync' in the state"),
        ({}, {"shuffle": 3}, "shuffle is 3 here", "10 in the state"),
        ({}, {"seed": 2}, "seed is 2 here", "1 in the state"),
    ],
    ids=str,
)
def test_a_state_of_other_settings_is_refused_with_both_values(half, options, dataset_options, here, there):
    recipe = half.but(threshold=0.1, num_workers=2).but_dataset(shuffle=10)
    state = json.loads(json.dumps(recipe.build().state_dict()))
    with pytest.raises(ValueError, match="can't resume from this state") as refused:
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
    with pytest.raises(ValueError, match="the state has version 99, this version reads 2"):
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
