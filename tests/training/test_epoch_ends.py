"""Where an epoch of a Trainer ends, and what a run that is resumed there goes on with."""

import lightning as L
import pytest

from tests.support.fitting import Recorder, SaveEverywhere, fit


def keys_of(trained):
    """The batches without the epochs that Lightning counts, which are others after some resumes."""
    return [keys for _, *keys in trained]


@pytest.mark.parametrize("trainer", [{"max_epochs": 2}, {"max_epochs": 5, "max_steps": 6}], ids=str)
def test_an_epoch_that_limit_train_batches_cut_off_is_over(data, tmp_path, trainer):
    trainer = {**trainer, "limit_train_batches": 3}
    whole = fit(data, trainer, callbacks=[SaveEverywhere(tmp_path)]).trained
    for saved in ("batch3", "epoch0"):
        rest = fit(data, trainer, checkpoint=tmp_path / f"{saved}.ckpt").trained
        assert keys_of(rest) == keys_of(whole[3:]) != [], saved
        assert rest == whole[3:] or "max_steps" in trainer, saved


def test_an_epoch_that_ends_before_limit_train_batches_is_over(data, tmp_path):
    trainer = {"limit_train_batches": 100}
    whole = fit(data, trainer, callbacks=[SaveEverywhere(tmp_path)]).trained
    assert whole == fit(data, {}).trained
    rest = fit(data, trainer, checkpoint=tmp_path / "epoch0.ckpt").trained
    assert rest == [batch for batch in whole if batch[0] == 1]


@pytest.mark.parametrize("trainer", [{}, {"limit_train_batches": 3}], ids=str)
def test_a_last_batch_whose_step_failed_is_trained_on_by_the_resumed_run(data, tmp_path, trainer):
    class SaveOnError(L.Callback):
        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    class FailsAtTheEnd(Recorder):
        def training_step(self, batch, index):
            if len(self.trained) == num_done:
                raise RuntimeError("no memory")
            return super().training_step(batch, index)

    whole = fit(data, trainer).trained
    num_done = sum(batch[0] == 0 for batch in whole) - 1
    with pytest.raises(RuntimeError, match="no memory"):
        fit(data, trainer, callbacks=[SaveOnError()], module=FailsAtTheEnd())
    assert fit(data, trainer, checkpoint=tmp_path / "saved.ckpt").trained == whole[num_done:]
