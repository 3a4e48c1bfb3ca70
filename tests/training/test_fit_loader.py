"""The fit loop's own switches, and a loader that it is given as it is."""

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader

from clipfilter_wds.training.datamodule import ClipFilterDataModule
from clipfilter_wds.training.loader import ClipFilterLoader
from tests.support.fitting import TRUSTED, Recorder, SaveEverywhere, data_module, fit, in_groups, new_trainer

REPEAT = {"end": "repeat", "batches_per_epoch": 3}


def keys_of(trained):
    """The batches without their epochs."""
    return [keys for _, *keys in trained]


@pytest.mark.parametrize("more", [{}, REPEAT], ids=["sync", "repeat"])
def test_overfit_batches_are_the_same_in_every_epoch_also_after_a_resume(data, tmp_path, more):
    trainer = {"overfit_batches": 2, "max_epochs": 3}
    whole = fit({**data, **more}, trainer, callbacks=[SaveEverywhere(tmp_path)]).trained
    batches = keys_of(whole)
    assert batches == 3 * batches[:2]
    assert batches[0] != batches[1]
    assert batches[0] == sorted(batches[0])  # in order, as Lightning has it where it turns shuffling off
    for saved in ("batch1", "batch2", "batch3", "epoch0"):
        rest = fit({**data, **more}, trainer, checkpoint=tmp_path / f"{saved}.ckpt").trained
        assert rest == whole[-len(rest) :], saved
        assert len(rest) == {"batch1": 5, "batch2": 4, "batch3": 3, "epoch0": 4}[saved]


@pytest.mark.parametrize(
    "more", [{}, REPEAT, pytest.param({"num_workers": 1, "persistent_workers": True}, marks=pytest.mark.slow)], ids=str
)
def test_reloaded_dataloaders_go_on_in_the_stream(data, tmp_path, more):
    plain = fit({**data, **more}, {"max_epochs": 4}).trained
    reload = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}
    whole = fit({**data, **more}, reload, callbacks=[SaveEverywhere(tmp_path)]).trained
    assert whole == plain
    for saved in (2, 4):  # within an epoch
        assert fit({**data, **more}, reload, checkpoint=tmp_path / f"batch{saved}.ckpt").trained == whole[saved:]


def test_reloading_after_a_resume_in_an_epoch_that_max_steps_cut_off_skips_no_order(data, tmp_path):
    whole = keys_of(fit(data, {"max_epochs": 4}).trained)
    fit(data, {"max_steps": 2}, callbacks=[SaveEverywhere(tmp_path)])
    reload = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}
    rest = keys_of(fit(data, reload, checkpoint=tmp_path / "epoch0.ckpt").trained)
    assert rest == whole[2 : 2 + len(rest)]
    assert len(rest) > 12


@pytest.mark.parametrize("more", [{}, REPEAT], ids=["sync", "repeat"])
def test_a_trainer_that_fits_twice_does_not_train_in_the_same_order_again(data, more):
    trainer, module, stream = new_trainer(max_epochs=1), Recorder(), data_module({**data, **more})
    trainer.fit(module, datamodule=stream)
    num_done = len(module.trained)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=stream)
    assert len(module.trained) == 2 * num_done
    assert module.trained[num_done][1:] == fit(data, {}).trained[6][1:]  # the first batch of the second epoch's order


class Peeks(L.Callback):
    """Looks at a training batch, as to log pictures, when a hook is called."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda trainer, *_: next(iter(trainer.datamodule.train_dataloader())))


@pytest.mark.parametrize(
    "hook",
    ["on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_validation_start", "on_train_epoch_end"],
)
def test_looking_at_a_batch_in_a_hook_changes_neither_training_nor_checkpoints(data, tmp_path, hook):
    whole = fit(data, {"val_check_interval": 3}, callbacks=[Peeks(hook), SaveEverywhere(tmp_path)]).trained
    assert whole == fit(data, {}).trained
    for saved in ("batch1", "batch4", "batch6", "epoch0"):
        rest = fit(data, {"val_check_interval": 3}, checkpoint=tmp_path / f"{saved}.ckpt").trained
        assert rest == whole[-len(rest) :], saved
        assert len(rest) == {"batch1": 11, "batch4": 8, "batch6": 6, "epoch0": 6}[saved]


# --- beside another loader ---


class Beside(ClipFilterDataModule):
    """Trains on numbers beside the filtered batches."""

    def __init__(self, mode: str, num_numbers: int, **options) -> None:
        super().__init__(**options)
        self.mode, self.numbers = mode, torch.arange(num_numbers)

    def train_dataloader(self):
        numbers = torch.utils.data.DataLoader(self.numbers, batch_size=1)
        return CombinedLoader({"pairs": super().train_dataloader(), "numbers": numbers}, self.mode)


class PairsRecorder(Recorder):
    def training_step(self, batch, index):
        return None if batch["pairs"] is None else super().training_step(batch["pairs"], index)


def fit_beside(data, mode, num_numbers, *, checkpoint=None, **trainer):
    module = PairsRecorder()
    beside = Beside(mode, num_numbers, **in_groups(data))
    new_trainer(**trainer).fit(module, datamodule=beside, ckpt_path=checkpoint, **TRUSTED)
    return keys_of(module.trained)


@pytest.mark.parametrize(("mode", "num_numbers"), [("min_size", 4), ("min_size", 20), ("max_size", 20)])
def test_a_run_with_another_loader_resumes_in_the_stream(data, tmp_path, mode, num_numbers):
    whole = fit_beside(data, mode, num_numbers, callbacks=[SaveEverywhere(tmp_path)])
    for num_done in (3, 4):
        rest = fit_beside(data, mode, num_numbers, checkpoint=tmp_path / f"batch{num_done}.ckpt")
        assert rest == whole[num_done:] != [], num_done


def test_a_loader_that_is_begun_again_in_an_epoch_is_not_saved(data, tmp_path):
    with pytest.raises(ValueError, match=r"begun the filtered batches again .* Make it CombinedLoader.*'min_size'"):
        fit_beside(data, "max_size_cycle", 20, callbacks=[SaveEverywhere(tmp_path)])


# --- a loader that is given to a Trainer as it is ---


def plain_loader(data) -> ClipFilterLoader:
    module = data_module(data)
    module.setup("fit")
    return module.train_dataloader()


@pytest.mark.parametrize("more", [{}, REPEAT], ids=["sync", "repeat"])
def test_a_trainer_fits_a_loader_and_is_refused_to_save_it(data, tmp_path, more):
    module = Recorder()
    new_trainer().fit(module, plain_loader({**data, **more}))
    assert module.trained == fit({**data, **more}, {}).trained
    with pytest.raises(ValueError, match="Give the Trainer a ClipFilterDataModule, whose checkpoints resume exactly"):
        new_trainer(callbacks=[SaveEverywhere(tmp_path)]).fit(Recorder(), plain_loader({**data, **more}))
    assert not list(tmp_path.glob("*"))


def test_a_loader_that_a_module_iterates_itself_can_be_saved_in_its_hooks(data, tmp_path):
    class Beside(Recorder):
        """Reads a loader of its own beside the one of the Trainer."""

        def on_train_start(self):
            self.loader = plain_loader(data)
            self.iterator = iter(self.loader)

        def on_train_batch_end(self, *_):
            next(self.iterator)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["beside"] = self.loader.state_dict()

    new_trainer(callbacks=[SaveEverywhere(tmp_path)], max_epochs=1).fit(Beside(), datamodule=data_module(data))
    state = torch.load(tmp_path / "batch3.ckpt", weights_only=True)["beside"]
    resumed = plain_loader(data)
    resumed.load_state_dict(state)
    num_begun = state["batches"]
    expected = [batch["__key__"] for batch in plain_loader(data)]
    assert 0 < num_begun < len(expected)
    assert [batch["__key__"] for batch in resumed] == expected[num_begun:]


def test_evaluating_a_loader_as_it_is_can_be_saved(data, tmp_path):
    module = data_module(data)
    module.setup("validate")
    trainer = new_trainer(max_epochs=1)

    class Fitted(Recorder):
        def train_dataloader(self):
            return torch.utils.data.DataLoader([{"__key__": "a", "image": torch.ones(3, 2, 2)}], batch_size=1)

    fitted = Fitted()
    trainer.fit(fitted, val_dataloaders=module.val_dataloader())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert sum(map(len, fitted.validated)) >= 20
    assert (tmp_path / "saved.ckpt").exists()
