import pytest

from clipfilter_wds.models.device import resolve_device


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="use auto, cpu, cuda or cuda:1"):
        resolve_device("gpu0")
    with pytest.raises(ValueError, match="this machine has"):
        resolve_device("cuda:99")
    for device in ("meta", "vulkan"):  # no machine computes on the one, and no package of torch has the other
        with pytest.raises(ValueError, match=f"device is '{device}', which can't be used here: .*; use auto"):
            resolve_device(device)
