"""The data module under real Trainers on real DDP ranks: epochs that end together, resume, failures."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torchmetrics import MeanMetric

from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.world import World
from tests.support.fitting import Recorder, SaveEverywhere, data_module, fit, new_trainer, on_ranks
from tests.support.processes import run_ranks
from tests.support.restore import threshold_that_keeps, write_numbered
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


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
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


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_resumes_on_one_and_on_three(resumable, tmp_path):
    # Many streams and small windows, so that each rank of three has some of what is left.
    data = {**resumable, "shuffle": 3, "batch_size": 4, "num_streams": 12, "val": resumable["train"].replace("*", "0")}
    validating = {"max_epochs": 2, "val_check_interval": 2}
    [[whole]] = trained_by_each(1, [Fit(data=data, trainer={"max_epochs": 1})])
    kept = sorted(key for _, *keys in whole for key in keys)
    two = trained_by_each(2, [Fit(data=data, trainer=validating, save=tmp_path)])[0]
    before = [key for rank in two for _, *keys in rank[:3] for key in keys]
    resumed = Fit(data=data, trainer=validating, checkpoint=tmp_path / "batch3.ckpt")
    for world_size in (1, 3):
        [rests] = trained_by_each(world_size, [resumed])
        assert len({len(rest) for rest in rests}) == 1
        given = before + [key for rest in rests for number, *keys in rest if number == 0 for key in keys]
        assert len(given) == len(set(given)) > len(before)
        assert set(given) <= set(kept)
        if world_size == 1:
            assert sorted(given) == kept
        following = [key for rest in rests for number, *keys in rest if number == 1 for key in keys]
        assert len(following) == len(set(following)) > 0


# --- validation ---


class Evaluated(Recorder):
    """Has buffers, which rank zero sends to the others, and logs the mean of the samples' numbers over all ranks."""

    def __init__(self, *, meets=False):
        super().__init__()
        self.norm, self.mean, self.meets = torch.nn.BatchNorm1d(1, affine=False), MeanMetric(), meets

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        numbers = torch.tensor([float(key) for key in batch["__key__"]])
        self.norm(numbers[:, None])
        if self.meets:  # as a contrastive loss does; gathering needs equal sizes
            numbers = self.all_gather(numbers)[~self.all_gather(batch["is_padding"])]
        self.mean.update(numbers)  # the mean of Lightning's own `sync_dist` is not exact on ranks with unequal numbers
        self.log("mean", self.mean)


def validate_each(data, checkpoint):
    """What this rank validates on in each of these ways, and what is logged."""
    ways = {
        "each": ({}, {}),
        "limited": ({}, {"limit_val_batches": 1}),
        "pad": ({"val_end": "pad"}, {}),
        "pad, limited": ({"val_end": "pad"}, {"limit_val_batches": 2}),
    }
    outcomes = {}
    for name, (options, limits) in ways.items():
        module, trainer = Evaluated(meets="pad" in name), new_trainer(**on_ranks(), **limits)
        [logged] = trainer.validate(
            module, data_module({**data, **options}), ckpt_path=checkpoint, weights_only=False, verbose=False
        )
        outcomes[name] = module.validated, logged["mean"]
    fitted = fit(data, {**on_ranks(), "num_sanity_val_steps": 3, "max_epochs": 1}, module=Evaluated())
    outcomes["fit"] = fitted.validated, fitted.trainer.callback_metrics["mean"].item()
    return outcomes


def save_first_batch(data, folder):
    fit(data, {**on_ranks(), "max_steps": 1}, callbacks=[SaveEverywhere(folder)], module=Evaluated())


@pytest.fixture(scope="module")
def saved_by_two(resumable, tmp_path_factory):
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, save_first_batch, resumable, folder)
    return folder / "batch1.ckpt"


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_validation_meets_every_sample_once_on_any_number_of_ranks(resumable, saved_by_two, tmp_path, world_size):
    shards = [[0], list(range(100, 117)), list(range(200, 205))]
    numbers = [number for shard in shards for number in shard]
    data = {**resumable, "val": write_numbered(tmp_path, shards), "batch_size": 4}
    by_rank = run_ranks(world_size, validate_each, data, saved_by_two)
    given = [int(key) for outcomes in by_rank for keys in outcomes["each"][0] for key in keys]
    assert sorted(given) == numbers
    num_batches = [len(outcomes["each"][0]) for outcomes in by_rank]
    assert world_size == 1 or len(set(num_batches)) > 1  # else the shards show nothing
    for outcomes, num in zip(by_rank, num_batches, strict=True):
        validated = {way: batches for way, (batches, _) in outcomes.items()}
        assert validated["limited"] == validated["each"][:1]
        assert validated["fit"][: min(3, num)] == validated["each"][:3]  # the sanity check
        assert validated["fit"][min(3, num) :] == validated["each"]
        assert [len(keys) for keys in validated["pad"]] == [4] * max(num_batches)
        assert validated["pad, limited"] == validated["pad"][:2]
        for way in ("each", "pad", "fit"):
            assert outcomes[way][1] == pytest.approx(sum(numbers) / len(numbers)), way


def validate_one_sample(data):
    with pytest.raises(RuntimeError, match="have nothing to evaluate") as raised:
        fit(data, on_ranks())  # at once, in the sanity check
    return str(raised.value)


def test_a_rank_with_nothing_to_validate_on_ends_all_with_cause_and_cure(resumable, tmp_path):
    told = run_ranks(2, validate_one_sample, {**resumable, "val": write_numbered(tmp_path, [[7]])})
    assert told[0] == told[1]
    assert "rank 1 keeps none of its 0 samples. Evaluate on fewer ranks (such as Trainer(devices=1))" in told[0]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_scorer_that_fails_on_one_rank_ends_training_on_all(clip_folder, scored, tmp_path, world_size):
    recipe = sorted_recipe(clip_folder, tmp_path, scored, world_size).but(threshold=None)
    one = Fit(data=data_options(recipe), trainer={"max_epochs": 2}, bad_rank=world_size - 1)
    *others, [bad] = run_ranks(world_size, fit_each, [one])
    assert "device-side assert" in bad.error[1]
    for [other] in others:
        assert "another rank's data loading failed" in other.error[1]
        assert other.steps == bad.steps < 10
