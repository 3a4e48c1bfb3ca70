import json
import os
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from torch import distributed

from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.world import World
from tests.support.pace import FOREVER
from tests.support.processes import run_ranks
from tests.support.restore import (
    Recipe,
    check_restores_after_every_batch,
    flat,
    image_number,
    keys,
    load_scorer,
    threshold_that_keeps,
    write_numbered,
)
from tests.support.uneven import (
    ENDS,
    NUM_SAMPLES,
    SHARES,
    Warnings,
    break_scorer,
    check_each_pass_is_shared_out,
    score_numbers,
    sorted_recipe,
)


@pytest.fixture(scope="module")
def scored(clip_folder, tmp_path_factory):
    return score_numbers(clip_folder, tmp_path_factory.mktemp("scored"))


def run_each(recipes, num_epochs):
    """Per recipe what this rank gets: its epochs, or the error; and what the loader says of it."""
    warnings, outcomes = Warnings(), []
    for recipe in recipes:
        warnings.messages.clear()
        loader, epochs, left_over, error = recipe.build(), [], [], None
        for _ in range(num_epochs):
            try:
                epochs += keys(loader)
                left_over.append(loader.left_over)
            except (StarvationError, LookupError, RuntimeError) as raised:
                error = (type(raised), str(raised))
                break
        outcomes.append((epochs, left_over, error, list(warnings.messages), loader.stats))
    return outcomes


@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(2, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 0), (2, 2)))]
)
def test_uneven_ranks_end_together_at_any_keep_rate_and_share_no_sample(
    clip_folder, scored, tmp_path, world_size, num_workers
):
    base = sorted_recipe(clip_folder, tmp_path, scored, world_size)
    cases = [(share, end) for share in SHARES for end in ENDS]
    recipes = [base.but(threshold=threshold_that_keeps(s, scored), num_workers=num_workers, **end) for s, end in cases]
    by_rank = run_ranks(world_size, run_each, recipes, 2)
    for (share, end), outcomes in zip(cases, zip(*by_rank, strict=True), strict=True):
        what = (share, end)
        all_epochs = [epochs for epochs, *_ in outcomes]
        errors = [error for _, _, error, _, _ in outcomes]
        if share == 0:
            assert [error and error[0] for error in errors] == [StarvationError] * world_size, what
            assert all("threshold is 1.0" in message for _, message in errors)
            continue
        assert errors == [None] * world_size, what
        for epochs in zip(*all_epochs, strict=True):
            assert len({len(epoch) for epoch in epochs}) == 1, what
            if end["end"] == "sync":
                handed = flat(epochs)
                assert len(handed) == len(set(handed)), what
            else:
                assert {len(epoch) for epoch in epochs} == {6}, what
                assert {len(batch) for epoch in epochs for batch in epoch} == {4}, what
        kept = {f"{n:09d}" for n, score in scored.items() if score >= recipes[cases.index(what)].loader["threshold"]}
        if share < 1:
            assert {key for epochs in all_epochs for key in flat(epochs)} <= kept, what
        if end["end"] == "repeat" and not num_workers:
            all_keys = kept if share < 1 else {f"{number:09d}" for number in scored}
            check_each_pass_is_shared_out([flat(epochs) for epochs in all_epochs], base, all_keys)
        if end["end"] == "sync":
            check_left_over(outcomes, len(kept) if share < 1 else NUM_SAMPLES, share)


def check_left_over(outcomes, num_kept, share):
    """Each rank says the same of what was left, and it is told where there was no batch for all."""
    assert len({tuple(left_over) for _, left_over, _, _, _ in outcomes}) == 1
    for rank, (epochs, left_over, _, messages, _) in enumerate(outcomes):
        if share in (0.01, 0.5):
            # One half of the ranks keeps nothing, so that no rank makes a step.
            assert epochs == [[], []]
            assert all(left_over)
            assert len([message for message in messages if "left over" in message]) == (2 if rank == 0 else 0)
            if rank == 0:
                assert "ended after 0 batches on every rank" in messages[0]
                assert f"at least {left_over[0]} were ready" in messages[0]
        else:
            assert not any(left_over)
            assert not messages
    if share == 1:
        assert sum(len(flat(epochs)) for epochs, *_ in outcomes) == 2 * num_kept


@pytest.mark.parametrize("world_size", [2])
def test_every_left_over_batch_is_counted(clip_folder, scored, tmp_path, world_size):
    # Rank 0 keeps a batch and a half in an epoch, rank 1 for many: it stops when rank 0 does.
    ranked = sorted(scored, key=scored.__getitem__, reverse=True)
    good, bad = ranked[:100], ranked[100:]
    shards = write_numbered(tmp_path, [[*good[:6], *bad], good[6:]])
    threshold = threshold_that_keeps(0.5, scored)
    recipe = Recipe(
        clip=clip_folder, shards=shards, loader={"batch_size": 4, "score_batch_size": 50, "threshold": threshold}
    )
    outcomes = [outcome for (outcome,) in run_ranks(world_size, run_each, [recipe], 1)]
    for rank, (epochs, left_over, error, messages, _) in enumerate(outcomes):
        assert error is None
        assert [len(batch) for batch in epochs[0]] == ([4, 2] if rank == 0 else [4, 4])
        assert left_over[0] >= 1
        told = f"at least {left_over[0]} were ready and left over (by rank: [0, {left_over[0]}])"
        assert [told in message for message in messages] == ([True] if rank == 0 else [])


def test_the_ranks_take_turns_so_that_over_the_epochs_each_sees_every_kept_sample(clip_folder, scored, tmp_path):
    base = sorted_recipe(clip_folder, tmp_path, scored, 2)
    recipe = base.but(threshold=threshold_that_keeps(0.5, scored), end="repeat", batches_per_epoch=25)
    for ((epochs, _, error, _, stats),) in run_ranks(2, run_each, [recipe], 4):
        assert error is None
        assert len(set(flat(epochs))) == 100
        assert stats.seen == stats.kept + sum(stats.dropped.values())


def test_stats_count_every_sample_once_over_all_ranks(clip_folder, scored, tmp_path):
    base = sorted_recipe(clip_folder, tmp_path, scored, 2)
    recipe = base.but(threshold=threshold_that_keeps(0.5, scored))
    for num_epochs in (1, 3):
        all_stats = [outcome[-1] for (outcome,) in run_ranks(2, run_each, [recipe], num_epochs)]
        # The rank that ends an epoch has read all of its half; the other need not have.
        assert NUM_SAMPLES // 2 * num_epochs <= sum(stats.seen for stats in all_stats) <= NUM_SAMPLES * num_epochs


# --- failures ---


def fail_at(bad, image):
    number = image_number(image)
    if number == bad:
        raise LookupError(f"no label for {number}")
    return number


def fail_each(recipes):
    return [(epochs, error) for epochs, _, error, _, _ in run_each(recipes, 3)]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_failure_on_one_rank_ends_all_with_an_error(clip_folder, scored, tmp_path, world_size):
    base = sorted_recipe(clip_folder, tmp_path, scored, world_size).but(threshold=None)
    ranked = sorted(scored, key=scored.__getitem__, reverse=True)
    poisoned = base.but_dataset(image_transform=partial(fail_at, ranked[0]))  # the first shard, which is rank 0's
    recipes = [poisoned.but(num_workers=workers, **end) for workers in (0, 2) for end in ENDS]
    for rank, outcomes in enumerate(run_ranks(world_size, fail_each, recipes)):
        for epochs, error in outcomes:
            assert epochs == []
            assert error is not None
            assert error[0] is (LookupError if rank == 0 else RuntimeError)
            assert ("no label for" if rank == 0 else "another rank's data loading failed") in error[1]


def fail_in_scorer(recipe, bad_rank):
    """What each end policy comes to when one rank's scorer fails within the first epoch."""
    if distributed.get_rank() == bad_rank:
        break_scorer(load_scorer(recipe.clip), after=2)
    return [fail_each([recipe.but(**end)])[0] for end in ENDS]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_scorer_that_fails_on_one_rank_ends_all_with_an_error(clip_folder, scored, tmp_path, world_size):
    recipe = sorted_recipe(clip_folder, tmp_path, scored, world_size).but(threshold=None)
    bad_rank = world_size - 1
    for rank, outcomes in enumerate(run_ranks(world_size, fail_in_scorer, recipe, bad_rank)):
        for _, error in outcomes:
            assert error is not None
            assert error[0] is RuntimeError
            assert ("device-side assert" if rank == bad_rank else "another rank's data loading failed") in error[1]


def test_starvation_of_one_rank_within_its_limit_ends_all(clip_folder, scored, tmp_path):
    base = sorted_recipe(clip_folder, tmp_path, scored, 2)
    recipe = base.but(threshold=threshold_that_keeps(0.5, scored), starvation_limit=20, **ENDS[1])
    (_, first), (_, second) = (outcome for (outcome,) in run_ranks(2, fail_each, [recipe]))
    assert first[0] is RuntimeError
    assert second[0] is StarvationError
    assert "the last 24 samples left none" in second[1]


# --- save and restore ---


@pytest.mark.parametrize(
    ("num_workers", "shuffle", "options"),
    [
        (1, 16, {"end": "sync"}),
        *(
            pytest.param(num_workers, shuffle, options, marks=pytest.mark.slow)
            for num_workers in (0, 1, 3)
            for shuffle in (0, 16)
            for options in ({"end": "sync"}, {"end": "repeat", "batches_per_epoch": 6})
            if (num_workers, shuffle, options) != (1, 16, {"end": "sync"})
        ),
    ],
    ids=str,
)
def test_two_ranks_resume_after_every_batch_in_fresh_processes(
    clip_folder, scored, tmp_path, num_workers, shuffle, options
):
    shards = write_numbered(tmp_path, [list(range(first, first + 20)) for first in range(0, 100, 20)])
    recipe = Recipe(
        clip=clip_folder,
        shards=shards,
        dataset={"shuffle": shuffle},
        loader={"batch_size": 5, "score_batch_size": 8, "num_workers": num_workers, **options},
    )
    recipe = recipe.but(threshold=threshold_that_keeps(0.5, scored))
    records = check_restores_after_every_batch(recipe, num_epochs=2, world_size=2)
    assert all(len(epoch) > 1 for record in records for epoch in record.epochs)


# --- how people start it ---

SCRIPT = """
import json, sys
import torch
from torch import distributed
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.models.scorer import ClipScorer

torch.set_num_threads(1)
clip, shards, threshold, out = sys.argv[1:]
distributed.init_process_group("gloo")
scorer = ClipScorer(clip, device="cpu")
dataset = ClipWebDataset(shards, scorer.preprocess, shuffle=10)
loader = ClipFilterLoader(dataset, scorer, threshold=float(threshold), batch_size=4, score_batch_size=8, num_workers=1)
epochs = [[batch["__key__"] for batch in loader] for _ in range(2)]
rank = distributed.get_rank()
with open(f"{out}/{rank}.json", "w") as file:
    json.dump([epochs, loader.left_over], file)
distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_torchrun_with_an_uneven_stream_ends_by_itself(clip_folder, scored, tmp_path, world_size):
    shards = write_numbered(tmp_path / "in", [list(range(first, first + 25)) for first in range(0, 200, 25)])
    threshold = threshold_that_keeps(0.5, scored)
    (tmp_path / "train.py").write_text(SCRIPT)
    arguments = [str(clip_folder), shards, repr(threshold), str(tmp_path)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*launcher, str(tmp_path / "train.py"), *arguments],
        env=environment,
        timeout=FOREVER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_bytes()) for rank in range(world_size)]
    for epochs in zip(*(epochs for epochs, _ in by_rank), strict=True):
        assert len({len(batches) for batches in epochs}) == 1
        assert len(epochs[0]) > 10 // world_size
        handed = flat(epochs)
        assert len(handed) == len(set(handed))
        assert {int(key) for key in handed} <= {number for number, score in scored.items() if score >= threshold}
    assert len({left_over for _, left_over in by_rank}) == 1


def iterate_without_process_group(recipe):
    return list(islice(recipe.build(world=World(rank=0, world_size=2)), 1))


def test_several_ranks_without_process_group_are_an_explained_error(clip_folder, scored, tmp_path):
    recipe = sorted_recipe(clip_folder, tmp_path, scored, 2)
    with pytest.raises(ValueError, match=r"this is rank 0 of 2, .* call torch.distributed.init_process_group"):
        iterate_without_process_group(recipe)
