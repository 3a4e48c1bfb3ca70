"""A Trainer on a GPU gets the batches that one on a CPU gets, on its own device, and resumes with the next."""

import pytest

from tests.support.fitting import Recorder, SaveEverywhere, fit
from tests.support.gpu import DEVICES, fast_precision


class OnDevice(Recorder):
    """Remembers where batches were, too."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def training_step(self, batch, index):
        self.devices |= {batch["image"].device.type, batch["score"].device.type}
        return super().training_step(batch, index)


@pytest.mark.parametrize("device", DEVICES)
def test_a_trainer_on_a_device_gets_its_batches_there_and_resumes_with_the_next(data, tmp_path, device):
    on_cpu = fit({**data, "precision": "fp32"}, {}).trained
    data, trainer = (
        {**data, "precision": fast_precision(device), "num_workers": 2},
        {"accelerator": device, "devices": 1},
    )
    trained = fit(data, trainer, callbacks=[SaveEverywhere(tmp_path)], module=OnDevice())
    assert trained.devices == {device}
    assert sorted(key for _, *keys in trained.trained for key in keys) == sorted(
        key for _, *keys in on_cpu for key in keys
    )
    resumed = fit(data, trainer, checkpoint=tmp_path / "batch3.ckpt")
    assert resumed.trained == trained.trained[3:]
