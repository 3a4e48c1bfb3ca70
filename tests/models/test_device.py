import pytest

from clipfilter_wds.models.device import resolve_device


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="use auto, cpu, cuda or cuda:1"):
        resolve_device("gpu0")
    with pytest.raises(ValueError, match="this machine has"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("device", ["meta", "xla", "mtia"])
def test_a_kind_of_device_that_torch_can_name_and_not_compute_on(device):
    with pytest.raises(ValueError, match=f"can't compute on '{device}' here; use auto, cpu"):
        resolve_device(device)
