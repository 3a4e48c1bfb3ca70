"""The data module under real Trainers: resume through real checkpoints."""

import threading
import warnings

import lightning as L
import numpy as np
import pytest
import torch

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.datamodule import ClipFilterDataModule
from clipfilter_wds.training.keep_rate import StarvationError
from tests.support.fitting import THRESHOLD, TRUSTED, Recorder, SaveEverywhere, data_module, fit, new_trainer
from tests.support.score_tables import derive

EVAL_STAGES = ("val", "test", "predict")

CASES = {
    "plain": ({}, {}),
    "validation within the epoch and accumulated gradients": (
        {"num_workers": 2},
        {"val_check_interval": 3, "accumulate_grad_batches": 2, "check_val_every_n_epoch": None},
    ),
    "repeat": ({"end": "repeat", "batches_per_epoch": 5}, {}),
}
RUN = [pytest.param(case, marks=pytest.mark.slow if case.startswith("validation") else ()) for case in CASES]


@pytest.mark.parametrize("case", RUN)
def test_a_run_resumes_from_any_checkpoint_with_the_batch_after_the_one_trained_last(data, tmp_path, case):
    more, trainer = CASES[case]
    save = SaveEverywhere(tmp_path)
    whole = fit({**data, **more}, trainer, callbacks=[save]).trained
    assert save.num_saved == len(whole) > 8
    for saved in range(1, save.num_saved + 1):
        rest = fit({**data, **more}, trainer, checkpoint=tmp_path / f"batch{saved}.ckpt").trained
        assert rest == whole[saved:], saved
    rest = fit({**data, **more}, trainer, checkpoint=tmp_path / "epoch0.ckpt").trained
    assert rest == [batch for batch in whole if batch[0] == 1]


@pytest.mark.parametrize("case", RUN)
def test_a_run_that_max_steps_cut_off_resumes_where_it_was(data, tmp_path, case):
    more, trainer = CASES[case]
    data = {**data, **more}
    whole = [keys for _, *keys in fit(data, {**trainer, "max_epochs": 5}).trained]
    done, checkpoint = 0, None
    for max_steps in (2, 3):  # of the optimizer; the second stop is in the rest of the first one's epoch
        folder = tmp_path / str(max_steps)
        save = SaveEverywhere(folder)
        trained = fit(data, {**trainer, "max_steps": max_steps}, callbacks=[save], checkpoint=checkpoint).trained
        assert [keys for _, *keys in trained] == whole[done : done + len(trained)] != []
        done += len(trained)
        [checkpoint] = folder.glob("epoch*.ckpt")
        for saved in (folder / f"batch{save.num_saved}.ckpt", checkpoint):
            rest = [keys for _, *keys in fit(data, {**trainer, "max_epochs": 5}, checkpoint=saved).trained]
            assert rest == whole[done : done + len(rest)], saved
            assert len(rest) > 6


def test_another_threshold_is_refused_with_both_values(data, tmp_path):
    save = SaveEverywhere(tmp_path)
    fit(data, {"max_epochs": 1}, callbacks=[save])
    with pytest.raises(ValueError, match=r"threshold is 0\.2 here and 0\.12 in the state"):
        fit({**data, "threshold": 0.2}, {}, checkpoint=tmp_path / "batch2.ckpt")


# --- validation, test, prediction ---

KEYS = {stage: [f"{1000 * shard + number:09d}" for number in range(20)] for shard, stage in enumerate(EVAL_STAGES)}


@pytest.fixture
def evaluated(data, shards):
    """Options of a data module that has shards for each stage."""
    return {**data, **{stage: f"{shards}/{number}.tar" for number, stage in enumerate(EVAL_STAGES)}}


def flat(batches):
    return [key for keys in batches for key in keys]


@pytest.mark.parametrize("stage", EVAL_STAGES)
def test_evaluation_is_scored_and_unfiltered_unless_told(evaluated, stage):
    def batches(**options):
        module = data_module({**evaluated, **options})
        module.setup(stage)
        return list(getattr(module, f"{stage}_dataloader")())

    scored = batches()
    assert [key for batch in scored for key in batch["__key__"]] == KEYS[stage]
    assert min(batch["score"].min() for batch in scored) < THRESHOLD
    assert all("score" not in batch for batch in batches(score_unfiltered=False))
    filtered = batches(**{f"filter_{stage}": True})
    assert filtered
    assert min(batch["score"].min() for batch in filtered) >= THRESHOLD
    padded = batches(val_end="pad")
    assert [len(batch["__key__"]) for batch in padded] == [8, 8, 8]
    assert [int(batch["is_padding"].sum()) for batch in padded] == [0, 0, 4]


def test_evaluation_takes_its_scores_from_tables(evaluated, tmp_path):
    fit({**evaluated, "record": str(tmp_path)}, {"max_epochs": 1})
    with_model, from_tables = (
        data_module(evaluated),
        data_module({**evaluated, "model": "no/model", "scores": tmp_path}),
    )
    for module in (with_model, from_tables):
        module.setup("validate")
    for batch, expected in zip(from_tables.val_dataloader(), with_model.val_dataloader(), strict=True):
        assert torch.equal(batch["score"], expected["score"])


def test_scores_of_another_kind_need_a_threshold_even_if_0_25_could_be_one(evaluated, tmp_path):
    fit({**evaluated, "threshold": None, "record": tmp_path}, {"max_epochs": 1})
    derive(tmp_path, "sum", lambda cosines: 2 * cosines)
    evaluated.pop("threshold")
    unsaid = data_module({**evaluated, "scores": str(tmp_path)})
    unsaid.setup("fit")
    with pytest.raises(ValueError, match="of kind 'sum', which has no usual threshold; give a threshold that suits it"):
        unsaid.train_dataloader()
    assert list(unsaid.val_dataloader())  # filters nothing
    said = data_module({**evaluated, "scores": str(tmp_path), "threshold": 0.25})
    said.setup("fit")
    kept = list(said.train_dataloader())
    assert min(batch["score"].min() for batch in kept) >= 0.25


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_evaluation_without_shards_says_which_option_gives_them(data, method):
    module = data_module({**data, "val": None})
    option = "val" if method == "validate" else method
    with pytest.raises(ValueError, match=rf"no shards for this; give it some: ClipFilterDataModule\({option}=\.\.\.\)"):
        getattr(new_trainer(), method)(Recorder(), module)


def test_fitting_without_validation_warns_of_nothing(data):
    class TrainOnly(Recorder):
        validation_step = L.LightningModule.validation_step

    trainer, module = new_trainer(), data_module({**data, "val": None})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.fit(TrainOnly(), module)
    assert [str(warning.message) for warning in warned if warning.category.__name__.endswith("UserWarning")] == []


# --- positions are for fitting only ---

ORDERS = [
    ("fit", "validate", "fit", "test", "predict"),
    ("validate", "fit", "predict", "fit"),
    ("test", "predict", "validate", "fit", "validate"),
    ("predict", "resume", "validate", "fit"),
    ("resume", "resume", "test", "fit", "resume"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_data_module_does_its_stages_in_any_order(evaluated, tmp_path, order):
    whole = fit(evaluated, {"max_epochs": 2}, callbacks=[SaveEverywhere(tmp_path)]).trained
    checkpoint, data = tmp_path / "batch3.ckpt", data_module(evaluated)
    for stage in order:
        module, trainer = Recorder(), new_trainer(num_sanity_val_steps=0)
        if stage in ("fit", "resume"):
            trainer.fit(module, data, ckpt_path=checkpoint if stage == "resume" else None, **TRUSTED)
            assert module.trained == (whole[3:] if stage == "resume" else whole)
            assert flat(module.validated) == 2 * KEYS["val"]
            continue
        given = getattr(trainer, stage)(module, data, ckpt_path=checkpoint, **TRUSTED)
        batches = {"validate": module.validated, "test": module.tested, "predict": given}[stage]
        assert flat(batches) == KEYS["val" if stage == "validate" else stage]


def test_load_from_checkpoint_makes_a_data_module_that_begins_at_the_beginning(data, tmp_path):
    whole = fit(data, {}, callbacks=[SaveEverywhere(tmp_path)]).trained
    loaded = ClipFilterDataModule.load_from_checkpoint(tmp_path / "batch3.ckpt", **dict.fromkeys(TRUSTED, True))
    module = Recorder()
    new_trainer().fit(module, loaded)
    assert module.trained == whole


def test_it_gives_batches_without_a_trainer(data):
    module = data_module(data)
    with pytest.raises(RuntimeError, match=r'no model yet; call its setup\("fit"\) first'):
        module.train_dataloader()
    module.setup("fit")
    batches = [batch["__key__"] for batch in module.train_dataloader()]
    assert [[0, *keys] for keys in batches] == fit(data, {"max_epochs": 1}).trained


def test_nothing_kept_ends_in_the_explained_error(data):
    with pytest.raises(StarvationError, match="quantiles"):
        fit({**data, "threshold": 1.0}, {})


def test_scores_of_a_table_or_record_train_on_the_same_batches_as_the_model(data, tmp_path):
    scored = fit({**data, "record": str(tmp_path / "record")}, {})
    recorded = fit({**data, "record": str(tmp_path / "record")}, {})
    from_table = fit({**data, "model": "no/model", "scores": str(tmp_path / "record")}, {})
    assert scored.trained == recorded.trained == from_table.trained
    assert scored.validated == recorded.validated == from_table.validated
    assert {path.name for path in (tmp_path / "record").glob("*.parquet")} == {f"{n}.parquet" for n in range(4)}


def test_shards_that_are_not_there_are_left_out_where_that_is_asked_for(data, shards):
    data = {**data, "train": f"{shards}/{{0..9}}.tar", "skip_missing_shards": True}
    module = fit(data, {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1})
    assert module.trainer.datamodule.train_loader.dataset.urls == [f"{shards}/{n}.tar" for n in range(4)]


def test_every_option_of_scorer_and_loader_reaches_them(data):
    options = {"num_workers": 1, "persistent_workers": True, "worker_timeout": 30.0, "on_crash": "raise"}
    of_scorer = {"flip": True, "reduce": "min", "precision": "bf16"}
    module = fit({**data, **options, **of_scorer}, {"max_epochs": 1})
    loader = module.trainer.datamodule.train_loader
    assert {name: getattr(loader.config, name) for name in options} == options
    assert {name: loader.scorer.fingerprint[name] for name in of_scorer} == of_scorer


def test_persistent_workers_give_the_same_batches(data):
    plain, persistent = (
        fit({**data, "num_workers": 2, "persistent_workers": keep}, {"max_epochs": 3}) for keep in (False, True)
    )
    assert persistent.trained == plain.trained != []
    assert persistent.validated == plain.validated != []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clipfilter-")]


def test_hyperparameters_in_a_checkpoint_are_plain_values_that_make_the_data_module_again(data, shards, tmp_path):
    numbers = {"threshold": np.float32(data["threshold"]), "seed": np.int64(1), "shuffle": torch.tensor(3)}
    options = {**data, **numbers, "val": [shards / "0.tar"], "record": tmp_path / "record"}
    fit(options, {"max_epochs": 1}, callbacks=[SaveEverywhere(tmp_path)])
    hparams = torch.load(tmp_path / "epoch0.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert hparams["train"] == f"{shards}/*.tar"
    assert (hparams["val"], hparams["seed"], hparams["shuffle"]) == ([f"{shards}/0.tar"], 1, 3)
    assert hparams["scorer"]["model"] == data["model"]
    assert hparams["loader"]["record"] == str(tmp_path / "record")
    assert ClipFilterDataModule(**hparams).hparams == hparams


def test_an_option_that_cannot_be_used_is_refused_at_once():
    with pytest.raises(ValueError, match=r"loader\.end is 'each', which is for evaluation; give it as val_end"):
        ClipFilterDataModule("a.tar", loader=LoaderConfig(end="each"))
    with pytest.raises(TypeError, match=r"scorer is 'demo-tiny'; give a ScorerConfig, or a dict of its options"):
        ClipFilterDataModule("a.tar", scorer="demo-tiny")
    with pytest.raises(TypeError, match=r"scorer is a Linear; give a ScorerConfig, or a dict of its options"):
        ClipFilterDataModule("a.tar", scorer=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"LoaderConfig has no option 'treshold'; did you mean 'threshold'"):
        ClipFilterDataModule("a.tar", loader={"treshold": 0.28})
    with pytest.raises(ValueError, match="val_end is 'sync'; use 'each' or 'pad'"):
        ClipFilterDataModule("a.tar", val_end="sync")
    with pytest.raises(ValueError, match="reduce is 'median'; use max, mean or min"):
        ClipFilterDataModule("a.tar", scorer=ScorerConfig(reduce="median"))
    with pytest.raises(ValueError, match="batches_per_epoch says how many batches an epoch has"):
        ClipFilterDataModule("a.tar", loader=LoaderConfig(end="repeat"))


@pytest.mark.parametrize(
    ("image", "caption"), [(["png", "jpg"], ["txt", "json:caption"]), ("png,jpg", "txt,json:caption")]
)
def test_members_may_be_named_by_a_list_or_with_commas(data, image, caption):
    module = data_module({**data, "image": image, "caption": caption})
    module.setup("fit")
    assert module.train_dataloader().dataset.layout == SampleLayout(image="png,jpg", caption="txt,json:caption")
