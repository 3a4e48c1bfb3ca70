"""The data module under real Trainers on real DDP ranks: epochs that end together, resume, failures."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.world import World
from tests.support.fitting import Recorder, SaveEverywhere, fit, on_ranks
from tests.support.processes import run_ranks
from tests.support.restore import threshold_that_keeps
from tests.support.toys import pair, write_shard
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


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Options of the data module and of the Trainer; where to save, what to resume from, whose scorer fails."""

    data: Mapping[str, Any]
    trainer: Mapping[str, Any]
    save: Path | None = None
    checkpoint: Path | None = None
    bad_rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank trained on, as epoch and keys; its steps, and what was said."""

    trained: list[list[Any]]
    steps: int
    left_over: int
    warnings: list[str]
    error: tuple[type, str] | None


class BreakScorer(L.Callback):
    def on_train_start(self, trainer, *_):
        break_scorer(trainer.datamodule.train_loader.scorer, after=2)


def fit_each(fits):
    """Per fit, what came of it on this rank."""
    rank, ddp = World.current().rank, on_ranks()
    warnings, outcomes = Warnings(), []
    for one in fits:
        warnings.messages.clear()
        module, error = Recorder(), None
        callbacks = [SaveEverywhere(one.save)] if one.save else []
        callbacks += [BreakScorer()] if rank == one.bad_rank else []
        try:
            fit(one.data, {**ddp, **one.trainer}, callbacks=callbacks, checkpoint=one.checkpoint, module=module)
        except (RuntimeError, ValueError) as raised:
            error = (type(raised), str(raised))
        outcome = Outcome(
            trained=module.trained,
            steps=module.trainer.global_step,
            left_over=getattr(module.trainer.datamodule.train_loader, "left_over", 0),
            warnings=list(warnings.messages),
            error=error,
        )
        outcomes.append(outcome)
    return outcomes


def data_options(recipe):
    return {"train": recipe.shards, "model": str(recipe.clip), "shuffle": 0, **recipe.loader}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_uneven_ranks_make_the_same_steps_at_any_keep_rate_and_share_no_sample(
    clip_folder, scored, tmp_path, world_size
):
    base = sorted_recipe(clip_folder, tmp_path, scored, world_size)
    cases = [(share, end) for share in SHARES for end in ENDS]
    recipes = [base.but(threshold=threshold_that_keeps(share, scored), **end) for share, end in cases]
    fits = [Fit(data=data_options(recipe), trainer={"max_epochs": 2}) for recipe in recipes]
    by_rank = run_ranks(world_size, fit_each, fits)
    for (share, end), recipe, outcomes in zip(cases, recipes, zip(*by_rank, strict=True), strict=True):
        what = (share, end["end"])
        errors = [outcome.error for outcome in outcomes]
        if share == 0:
            assert [error and error[0] for error in errors] == [StarvationError] * world_size, what
            continue
        assert errors == [None] * world_size, what
        threshold = recipe.loader["threshold"]
        kept = {f"{number:09d}" for number, score in scored.items() if min(max(score, 0.0), 1.0) >= threshold}
        assert len(kept) == round(share * NUM_SAMPLES)
        if end["end"] == "repeat":
            check_repeat(outcomes, recipe, kept)
        else:
            check_sync(outcomes, len(kept), share)


def check_repeat(outcomes, recipe, kept):
    """Each rank makes every step, all of them full; in no pass over the shards do two ranks meet a sample."""
    assert [outcome.steps for outcome in outcomes] == [12] * len(outcomes)
    assert {len(keys) for outcome in outcomes for _, *keys in outcome.trained} == {4}
    handed = [[key for _, *keys in outcome.trained for key in keys] for outcome in outcomes]
    check_each_pass_is_shared_out(handed, recipe, kept)


def check_sync(outcomes, num_kept, share):
    """As many steps on each rank as the poorest rank has batches; rank zero tells, once an epoch, what was left."""
    assert len({outcome.steps for outcome in outcomes}) == 1
    [left_over] = {outcome.left_over for outcome in outcomes}
    for epoch in range(2):
        handed = [key for one in outcomes for number, *keys in one.trained if number == epoch for key in keys]
        assert len(handed) == len(set(handed)) == (num_kept if share == 1 else 0)
    assert not any(outcome.warnings for outcome in outcomes[1:])
    told = outcomes[0].warnings
    if share == 1:
        assert left_over == 0
        assert not told
    else:  # one half of the ranks keeps nothing, so that no rank makes a step
        assert left_over > 0
        assert len(told) == 2
        assert f"at least {left_over} were ready and left over" in told[-1]


@pytest.fixture(scope="module")
def resumable(clip_folder, tmp_path_factory):
    """Options of a data module that gives some six batches an epoch."""
    folder = tmp_path_factory.mktemp("resumable")
    for shard in range(4):
        samples = [pair(shard * 100 + number) for number in range(20)]
        write_shard(folder / f"{shard}.tar", samples, start=1000 * shard)
    return {
        "train": f"{folder}/*.tar",
        "model": str(clip_folder),
        "threshold": 0.12,  # keeps about 60 % of these pairs
        "batch_size": 8,
        "score_batch_size": 6,
    }


def trained_by_each(world_size, fits):
    """Per fit, what each rank trained on; all fits in the same fresh processes."""
    by_rank = run_ranks(world_size, fit_each, fits)
    outcomes = list(zip(*by_rank, strict=True))
    assert [outcome.error for ranks in outcomes for outcome in ranks if outcome.error] == []
    return [[outcome.trained for outcome in ranks] for ranks in outcomes]


@pytest.mark.parametrize(
    ("world_size", "num_workers", "shuffle"),
    [
        (2, 0, 15),
        *(
            pytest.param(world_size, num_workers, shuffle, marks=pytest.mark.slow)
            for world_size in (1, 2)
            for num_workers in (0, 1, 3)
            for shuffle in (0, 15)
            if (world_size, num_workers, shuffle) != (2, 0, 15)
        ),
    ],
)
def test_ranks_resume_from_any_checkpoint_in_fresh_processes(resumable, tmp_path, world_size, num_workers, shuffle):
    data = {**resumable, "num_workers": num_workers, "shuffle": shuffle}
    two_epochs = Fit(data=data, trainer={"max_epochs": 2})
    [wholes] = trained_by_each(world_size, [replace(two_epochs, save=tmp_path)])
    num_steps = len(wholes[0])
    assert [len(whole) for whole in wholes] == [num_steps] * world_size
    assert num_steps > 4
    for epoch in range(2):
        handed = [key for whole in wholes for number, *keys in whole if number == epoch for key in keys]
        assert len(handed) == len(set(handed)) > 0
    stops = range(1, num_steps + 1)
    rests = trained_by_each(
        world_size, [replace(two_epochs, checkpoint=tmp_path / f"batch{stop}.ckpt") for stop in stops]
    )
    for stop, rest in zip(stops, rests, strict=True):
        assert rest == [whole[stop:] for whole in wholes], stop


def test_ranks_that_max_steps_cut_off_resume_where_they_were(resumable, tmp_path):
    data = {**resumable, "shuffle": 15}
    two_epochs = Fit(data=data, trainer={"max_epochs": 2})
    wholes, cuts = trained_by_each(2, [two_epochs, Fit(data=data, trainer={"max_steps": 2}, save=tmp_path)])
    assert cuts == [whole[:2] for whole in wholes]
    [rests] = trained_by_each(2, [replace(two_epochs, checkpoint=tmp_path / "epoch0.ckpt")])
    # Lightning counts the epoch that was cut off; the batches continue.
    for rest, whole in zip(rests, wholes, strict=True):
        assert [keys for _, *keys in rest] == [keys for _, *keys in whole[2 : 2 + len(rest)]] != []


def test_a_checkpoint_of_another_number_of_ranks_is_refused_with_both(resumable, tmp_path):
    one = Fit(data=resumable, trainer={"max_steps": 1}, save=tmp_path)
    trained_by_each(2, [one])
    [[outcome]] = run_ranks(1, fit_each, [replace(one, save=None, checkpoint=tmp_path / "batch1.ckpt")])
    assert outcome.error == (ValueError, "the checkpoint was written by 2 ranks and is read by 1")


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_scorer_that_fails_on_one_rank_ends_training_on_all(clip_folder, scored, tmp_path, world_size):
    recipe = sorted_recipe(clip_folder, tmp_path, scored, world_size).but(threshold=None)
    one = Fit(data=data_options(recipe), trainer={"max_epochs": 2}, bad_rank=world_size - 1)
    *others, [bad] = run_ranks(world_size, fit_each, [one])
    assert "device-side assert" in bad.error[1]
    for [other] in others:
        assert "another rank's data loading failed" in other.error[1]
        assert other.steps == bad.steps < 10
