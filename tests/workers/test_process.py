import torch

from clipfilter_wds.workers.process import init_worker
from tests.support.processes import in_fresh_process


def test_a_worker_makes_tensors_on_the_cpu_whatever_the_default_device_of_its_script():
    assert in_fresh_process(device_in_worker, "meta") == "cpu"


def device_in_worker(default: str) -> str:
    torch.set_default_device(default)
    init_worker(0)
    return str(torch.ones(1).device)
