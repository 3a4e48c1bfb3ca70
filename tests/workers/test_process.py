import multiprocessing
import pickle

import pytest
import torch

from clipfilter_wds.workers.process import init_worker, starting
from tests.support.processes import in_fresh_process


def test_a_worker_makes_tensors_on_the_cpu_whatever_the_default_device_of_its_script():
    assert in_fresh_process(device_in_worker, "meta") == "cpu"


def device_in_worker(default: str) -> str:
    torch.set_default_device(default)
    init_worker(0)
    return str(torch.ones(1).device)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("target", [lambda: None, (number for number in ())], ids=["lambda", "generator"])
def test_what_can_not_be_pickled_for_a_spawned_process_is_told_with_what_can(method, target):
    process = multiprocessing.get_context(method).Process(target=target)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError), match="pickle") as error, starting():
        process.start()
    assert error.value.__notes__ == [
        "Where processes are spawned (by default from Python 3.14), what they run is pickled: give them functions "
        "and classes of a module, no lambdas and none that are defined in a function"
    ]
