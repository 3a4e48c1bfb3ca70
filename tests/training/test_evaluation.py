"""Loaders that evaluate, on one and on several real ranks: every sample once, and no rank waits for ever."""

from functools import partial
from itertools import islice

import pytest
import torch

from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.world import World
from tests.support.processes import run_ranks
from tests.support.restore import Recipe, flat, image_number, keys, write_numbered

#: Two small shards and a large one, so that ranks have unequal numbers of batches.
SHARDS = [list(range(3)), list(range(100, 117)), list(range(200, 205))]
ALL_KEYS = sorted(f"{number:09d}" for shard in SHARDS for number in shard)


@pytest.fixture(scope="module")
def recipe(clip_folder, tmp_path_factory):
    return Recipe(
        clip=clip_folder,
        shards=write_numbered(tmp_path_factory.mktemp("evaluation"), SHARDS),
        dataset={"image_transform": image_number},
        loader={"threshold": None, "batch_size": 4, "score_batch_size": 4, "end": "each"},
    )


def evaluate(recipe):
    """The batches of an iteration and, after one that is broken off, of another. Ranks that pad break off together."""
    loader = recipe.build()
    first = list(loader)
    list(islice(loader, 1 if World.current().rank == 0 or recipe.loader["end"] == "pad" else None))
    return first, list(loader)


def evaluate_each(recipes):
    return [evaluate(recipe) for recipe in recipes]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_comes_once_on_any_number_of_ranks_and_the_same_every_time(recipe, world_size):
    by_rank = run_ranks(world_size, evaluate_each, [recipe, recipe.but(end="pad")])
    each, pad = ([outcomes[number] for outcomes in by_rank] for number in (0, 1))
    for iteration in (0, 1):
        batches = [outcome[iteration] for outcome in each]
        assert sorted(key for rank in batches for batch in rank for key in batch["__key__"]) == ALL_KEYS
        assert not any("is_padding" in batch for rank in batches for batch in rank)
        check_padded([outcome[iteration] for outcome in pad], unpadded=batches)
    if world_size > 1:
        assert len({len(outcome[0]) for outcome in each}) > 1  # else the shards show nothing


def check_padded(by_rank, unpadded):
    """As many batches on every rank, all of one size, and without what is marked they are those of ``unpadded``."""
    assert {len(batches) for batches in by_rank} == {max(map(len, unpadded))}
    for batches, expected in zip(by_rank, unpadded, strict=True):
        real = []
        for batch in batches:
            assert batch["is_padding"].dtype == torch.bool
            assert {len(batch[name]) for name in ("image", "text", "score", "__key__", "is_padding")} == {4}
            assert [int(key) for key in batch["__key__"]] == batch["image"].tolist()  # repeated rows are whole rows
            real += [key for key, mark in zip(batch["__key__"], batch["is_padding"].tolist(), strict=True) if not mark]
        assert real == [key for batch in expected for key in batch["__key__"]]


def errors_of_each(recipes):
    errors = []
    for recipe in recipes:
        try:
            keys(recipe.build())
            errors.append(None)
        except (LookupError, RuntimeError) as error:
            errors.append((type(error), str(error)))
    return errors


@pytest.mark.parametrize("end", ["each", "pad"])
def test_a_rank_with_nothing_to_evaluate_ends_all_with_cause_and_cure(recipe, tmp_path, end):
    one_sample = Recipe(clip=recipe.clip, shards=write_numbered(tmp_path, [[7]]), loader={**recipe.loader, "end": end})
    nothing_kept = recipe.but(threshold=1.0, end=end)
    for lonely, starved in run_ranks(3, errors_of_each, [one_sample, nothing_kept]):
        assert lonely[0] is RuntimeError
        assert lonely[1].startswith("2 of 3 ranks have nothing to evaluate")
        assert "rank 1 keeps none of its 0 samples, rank 2 keeps none of its 0 samples. Evaluate on fewer" in lonely[1]
        assert starved[0] is StarvationError
        assert f"all {len(ALL_KEYS)} samples left none" in starved[1]


def fail_at(bad, image):
    number = image_number(image)
    if number == bad:
        raise LookupError(f"no label for {number}")
    return number


def test_a_rank_that_fails_ends_all_where_they_agree(recipe):
    def poisoned(bad, end):
        return recipe.but(end=end).but_dataset(image_transform=partial(fail_at, bad))

    at_first, later = SHARDS[0][0], SHARDS[1][-1]
    outcomes = run_ranks(
        2, errors_of_each, [poisoned(at_first, "each"), poisoned(at_first, "pad"), poisoned(later, "pad")]
    )
    for errors in zip(*outcomes, strict=True):
        assert sorted(kind.__name__ for kind, _ in errors) == ["LookupError", "RuntimeError"]
        assert any("another rank's data loading failed" in message for _, message in errors)


def test_it_cannot_be_resumed_and_says_so(recipe):
    with pytest.raises(ValueError, match="end is 'each'; only training, with 'sync' or 'repeat', can be resumed"):
        recipe.build().state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_last": True}, "end is 'each', which gives every sample; it does not go with drop_last"),
        ({"num_workers": 1, "persistent_workers": True}, "persistent_workers needs"),
        ({"batches_per_epoch": 3}, "batches_per_epoch is for end 'repeat', and end is 'each'"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        recipe.build(**options)


def test_workers_give_the_same_samples(recipe):
    assert sorted(flat(keys(recipe.build(num_workers=2)))) == ALL_KEYS
