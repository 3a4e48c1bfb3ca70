"""The data module under real Trainers: resume through real checkpoints, and two real DDP ranks."""

import json
import multiprocessing
import os
import socket
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch

from clipfilter_wds.datamodule import ClipFilterDataModule, ClipFilterMonitor
from clipfilter_wds.watch import StarvationError
from tests.toys import pair, write_shard

THRESHOLD = 0.12  # keeps about 60 % of these pairs
context = multiprocessing.get_context("forkserver")


class Recorder(L.LightningModule):
    """Remembers the epoch and keys of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.trained, self.validated = [], []

    def training_step(self, batch, index):
        self.trained.append([self.current_epoch, *batch["__key__"]])
        return self.weight(batch["image"].float().mean(dim=(1, 2, 3))[:, None]).mean()

    def validation_step(self, batch, index):
        self.validated.append(batch["__key__"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


class SaveEverywhere(L.Callback):
    """Saves a checkpoint after every batch and at the end of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_saved = folder, 0

    def on_train_batch_end(self, trainer, *_):
        self.num_saved += 1
        trainer.save_checkpoint(self.folder / f"batch{self.num_saved}.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"epoch{trainer.current_epoch}.ckpt")


def fit(data: dict, trainer: dict, *, callbacks=(), checkpoint=None, module=None) -> Recorder:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = module or Recorder()
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 1, **trainer}
    runner = L.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    runner.fit(module, datamodule=ClipFilterDataModule(**data), ckpt_path=checkpoint, weights_only=False)
    return module


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
def test_a_run_goes_on_from_any_checkpoint_with_the_batch_after_the_one_trained_last(data, tmp_path, case):
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
def test_a_run_that_max_steps_cut_off_goes_on_where_it_was(data, tmp_path, case):
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


# --- two real ranks ---


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ddp_rank(rank: int, port: int, result: Path, data: dict, save: str | None, checkpoint: str | None) -> None:
    """One rank of a DDP run, as a launcher such as torchrun starts it; writes what it trained on."""
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "test",
        }
    )
    callbacks = [SaveEverywhere(Path(save))] if save else []
    trainer = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    module = fit(data, trainer, callbacks=callbacks, checkpoint=checkpoint)
    (result / f"{rank}.json").write_text(json.dumps(module.trained))


def run_ddp(result: Path, data: dict, *, save: Path | None = None, checkpoint: Path | None = None) -> list[list]:
    result.mkdir()
    port = free_port()
    arguments = (port, result, data, save and str(save), checkpoint and str(checkpoint))
    ranks = [context.Process(target=ddp_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    return [json.loads((result / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_share_samples_step_together_and_resume_exactly(data, tmp_path):
    whole = run_ddp(tmp_path / "whole", data, save=tmp_path)
    assert len(whole[0]) == len(whole[1]) > 4
    first_epoch = [key for rank in whole for epoch, *keys in rank for key in keys if epoch == 0]
    assert len(first_epoch) == len(set(first_epoch))
    for saved in (1, len(whole[0]) // 2, len(whole[0]) - 1):
        rest = run_ddp(tmp_path / f"rest{saved}", data, checkpoint=tmp_path / f"batch{saved}.ckpt")
        assert rest == [rank[saved:] for rank in whole]
