import pytest

from clipfilter_wds.models.device import resolve_device


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="use auto, cpu, cuda or cuda:1"):
        resolve_device("gpu0")
    with pytest.raises(ValueError, match="this machine has"):
        resolve_device("cuda:99")
