import json
from itertools import islice

import pytest

from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.shards.urls import expand_shards
from tests.support.processes import run_ranks
from tests.support.restore import Recipe, expected_keys, flat, keys, score_by_key, threshold_that_keeps, write_numbered


@pytest.fixture(scope="module")
def recipe(clip_folder, tmp_path_factory):
    shards = write_numbered(
        tmp_path_factory.mktemp("elastic"), [list(range(first, first + 15)) for first in range(0, 150, 15)]
    )
    whole = Recipe(
        clip=clip_folder,
        shards=shards,
        dataset={"shuffle": 10, "seed": 3},
        loader={"batch_size": 3, "score_batch_size": 8},
    )
    return whole.but(threshold=threshold_that_keeps(0.6, score_by_key(whole)))


def go_on(recipe, states, num_batches):
    """From all ranks' states, so many batches of each rank; their keys, and this rank's state."""
    loader = recipe.build()
    if states:
        loader.load_state_dict([json.loads(state) for state in states])
    iterator = iter(loader)
    batches = [batch["__key__"] for batch in islice(iterator, num_batches)]
    iterator.close()
    return batches, json.dumps(loader.state_dict()), loader.left_over


def leg(recipe, world_size, num_workers, states, num_batches):
    """What all ranks of a part of a run give, and their states."""
    outcomes = run_ranks(world_size, go_on, recipe.but(num_workers=num_workers), states, num_batches)
    return flat([batches for batches, _, _ in outcomes]), [state for _, state, _ in outcomes], outcomes


@pytest.mark.parametrize(
    ("legs", "shuffle"),
    [
        ([(2, 2, 3), (1, 3, 7), (4, 0, 2), (1, 0, None)], 10),
        pytest.param([(1, 3, 5), (3, 1, 2), (2, 0, 4), (1, 2, None)], 0, marks=pytest.mark.slow),
    ],
)
def test_a_plain_loop_resumed_on_other_ranks_and_workers_gives_each_kept_sample_once(recipe, legs, shuffle):
    recipe = recipe.but_dataset(shuffle=shuffle)
    given, states = [], []
    for world_size, num_workers, num_batches in legs:
        more, states, _ = leg(recipe, world_size, num_workers, states, num_batches)
        given += more
    assert len(given) == len(set(given))
    assert sorted(given) == expected_keys(recipe, score_by_key(recipe))


def test_after_it_was_resumed_on_other_ranks_a_run_resumes_exactly(recipe):
    _, states, _ = leg(recipe, 2, 1, [], 3)
    whole, _, _ = leg(recipe, 1, 2, states, None)
    first, again, _ = leg(recipe, 1, 2, states, 4)
    rest, _, _ = leg(recipe, 1, 2, again, None)
    assert first + rest == whole


def test_the_next_epoch_is_whole_on_the_ranks_of_now(recipe):
    _, states, _ = leg(recipe, 1, 0, [], 3)
    outcomes = run_ranks(3, _rest_and_next_epoch, recipe.but(drop_last=False), states)
    assert all(warned == (["too few for 3 ranks"] if rank == 0 else []) for rank, (_, _, warned) in enumerate(outcomes))
    assert flat([rest for rest, _, _ in outcomes]) == []
    following = flat([epoch for _, epoch, _ in outcomes])
    assert len(following) == len(set(following))
    assert len(following) > 0.8 * len(expected_keys(recipe, score_by_key(recipe)))


def test_on_another_number_of_ranks_the_batch_size_may_be_another_one(recipe):
    given, states, _ = leg(recipe, 2, 0, [], 2)
    rest, _, _ = leg(recipe.but(batch_size=6), 1, 0, states, None)
    assert sorted(given + rest) == expected_keys(recipe, score_by_key(recipe))
    (outcome,) = run_ranks(2, _refusal, recipe.but(batch_size=6), states)[:1]
    assert "batch_size is 6 here and 3 in the state" in outcome


def _refusal(recipe, states):
    with pytest.raises(ValueError, match="can't resume") as refused:
        recipe.build().load_state_dict([json.loads(state) for state in states])
    return str(refused.value)


def test_what_is_recorded_on_some_ranks_is_used_and_completed_on_others(recipe, tmp_path):
    recording = recipe.but(record=str(tmp_path / "record"))
    given, states, _ = leg(recording, 2, 2, [], 4)
    rest, _, _ = leg(recording, 1, 3, states, None)
    assert sorted(given + rest) == expected_keys(recipe, score_by_key(recipe))
    tables = ScoreFolder(tmp_path / "record")
    assert len(tables.lacking(expand_shards(recipe.shards))) == 0
    assert not list((tmp_path / "record" / "_parts").glob("*"))


def test_score_tables_decide_on_any_topology(recipe, tmp_path):
    keys(recipe.but(record=str(tmp_path / "record")).build())
    from_tables = recipe.from_table(tmp_path / "record")
    given, states, _ = leg(from_tables, 1, 2, [], 5)
    rest, _, _ = leg(from_tables, 2, 0, states, None)
    assert len(given + rest) == len(set(given + rest))
    assert set(given + rest) <= set(expected_keys(recipe, score_by_key(recipe)))


def _rest_and_next_epoch(recipe, states):
    from tests.support.uneven import Warnings

    warnings, loader = Warnings(), recipe.build()
    loader.load_state_dict([json.loads(state) for state in states])
    rest, epoch = keys(loader, 2)
    phrase = "too few for 3 ranks"
    return rest, epoch, [phrase for message in warnings.messages if phrase in message]
