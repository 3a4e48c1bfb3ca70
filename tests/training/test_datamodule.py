"""The data module under real Trainers: resume through real checkpoints."""

import threading

import lightning as L
import pytest
import torch

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.datamodule import ClipFilterDataModule
from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.training.monitor import ClipFilterMonitor
from tests.support.fitting import SaveEverywhere, fit
from tests.support.toys import pair, write_shard

THRESHOLD = 0.12  # keeps about 60 % of these pairs


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for shard in range(4):
        write_shard(folder / f"{shard}.tar", [pair(shard * 100 + i) for i in range(20)], start=1000 * shard)
    return folder


@pytest.fixture
def data(shards, clip_folder):
    return {
        "train": f"{shards}/*.tar",
        "val": f"{shards}/0.tar",
        "model": str(clip_folder),
        "threshold": THRESHOLD,
        "batch_size": 8,
        "score_batch_size": 6,
        "shuffle": 15,
    }


CASES = {
    "plain": ({}, {}),
    "validation within the epoch and accumulated gradients": (
        {"num_workers": 2},
        {"val_check_interval": 3, "accumulate_grad_batches": 2, "check_val_every_n_epoch": None},
    ),
    "repeat": ({"end": "repeat", "batches_per_epoch": 5}, {}),
}


@pytest.mark.parametrize("case", CASES)
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


@pytest.mark.parametrize(
    "case",
    ["plain", "repeat", pytest.param("validation within the epoch and accumulated gradients", marks=pytest.mark.slow)],
)
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


def test_an_epoch_that_limit_train_batches_cut_off_is_over(data, tmp_path):
    whole = fit(data, {"limit_train_batches": 3}, callbacks=[SaveEverywhere(tmp_path)]).trained
    rest = fit(data, {"limit_train_batches": 3}, checkpoint=tmp_path / "epoch0.ckpt").trained
    assert rest == whole[3:] != []


def test_another_threshold_is_refused_with_both_values(data, tmp_path):
    save = SaveEverywhere(tmp_path)
    fit(data, {"max_epochs": 1}, callbacks=[save])
    with pytest.raises(ValueError, match=r"threshold is 0\.2 here and 0\.12 in the state"):
        fit({**data, "threshold": 0.2}, {}, checkpoint=tmp_path / "batch2.ckpt")


def test_validation_is_unfiltered_and_the_same_every_time_unless_told(data):
    module = fit({**data, "filter_val": False}, {})
    epochs = [sorted(key for batch in module.validated[-3:] for key in batch)]
    assert epochs == [[f"{i:09d}" for i in range(20)]]
    filtered = fit({**data, "filter_val": True}, {"max_epochs": 1, "num_sanity_val_steps": 0}).validated
    assert 0 < sum(map(len, filtered)) < 20


def test_nothing_kept_ends_in_the_explained_error(data):
    with pytest.raises(StarvationError, match="quantiles"):
        fit({**data, "threshold": 1.0}, {})


class Log(L.pytorch.loggers.logger.DummyLogger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics, step=None):
        self.metrics.update(metrics)


def test_monitor_logs_what_the_filter_does(data):
    log = Log()
    fit(data, {"logger": log, "log_every_n_steps": 2}, callbacks=[ClipFilterMonitor()])
    logged = {name: value for name, value in log.metrics.items() if name.startswith("clipfilter/")}
    assert 0.4 < logged["clipfilter/keep_rate"] < 0.8
    assert logged["clipfilter/score_mean"] > THRESHOLD
    assert logged["clipfilter/dropped/below_threshold"] > 10
    assert logged["clipfilter/samples_per_second"] > 0
    assert 0 <= logged["clipfilter/wait_share"] <= 1


def test_scores_of_a_table_or_record_train_on_the_same_batches_as_the_model(data, tmp_path):
    scored = fit({**data, "record": str(tmp_path / "record")}, {})
    recorded = fit({**data, "record": str(tmp_path / "record")}, {})
    from_table = fit({**data, "model": "no/model", "scores": str(tmp_path / "record")}, {})
    assert scored.trained == recorded.trained == from_table.trained
    assert scored.validated == recorded.validated == from_table.validated
    assert {path.name for path in (tmp_path / "record").glob("*.parquet")} == {f"{n}.parquet" for n in range(4)}


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
    fit({**data, "record": tmp_path / "record"}, {"max_epochs": 1}, callbacks=[SaveEverywhere(tmp_path)])
    hparams = torch.load(tmp_path / "epoch0.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert hparams["train"] == f"{shards}/*.tar"
    assert hparams["scorer"]["model"] == data["model"]
    assert hparams["loader"]["record"] == str(tmp_path / "record")
    assert ClipFilterDataModule(**hparams).hparams == hparams


def test_an_option_that_cannot_be_used_is_refused_at_once():
    with pytest.raises(ValueError, match="reduce is 'median'; use max, mean or min"):
        ClipFilterDataModule("a.tar", scorer=ScorerConfig(reduce="median"))
    with pytest.raises(ValueError, match="'repeat' goes with it"):
        ClipFilterDataModule("a.tar", loader=LoaderConfig(end="repeat"))
