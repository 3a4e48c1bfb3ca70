"""Real Ray, trivial work."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from clipfilter_wds.offline.engines.ray_pool import RayPool, TaskFailure
from tests.support.pace import FOREVER

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Ray on this machine, as if it had four CPUs."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


class BrokenError(Exception):
    pass


def load() -> dict[str, int]:
    return {"loads": os.getpid()}


def pid(loaded: dict[str, int]) -> int:
    assert loaded["loads"] == os.getpid()
    return os.getpid()


def meet(loaded: dict[str, int], *, folder: Path) -> int:
    """Wait until tasks of this folder are done by two actors at once."""
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) == 2)
    return pid(loaded)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fail(loaded, *, log: Path, error: type[Exception]) -> None:
    with log.open("a") as file:
        file.write("x")
    raise error("as ever")


def die_once(loaded, *, log: Path) -> str:
    if not log.exists():
        log.touch()
        os._exit(1)
    return "done"


def refuse_to_load() -> None:
    raise RuntimeError("no such model")


def test_every_task_is_done_by_actors_that_load_once(tmp_path):
    with RayPool(load, cpus_per_task=2) as pool:
        results = dict(pool.map({str(i): partial(meet, folder=tmp_path) for i in range(20)}))
    assert sorted(results) == sorted(map(str, range(20)))
    assert len(set(results.values())) == 2
    wait_until(lambda: not any(map(psutil.pid_exists, results.values())))


def test_a_task_that_always_fails_is_given_up_and_the_others_are_done(tmp_path):
    tasks = {str(i): pid for i in range(6)} | {"bad": partial(fail, log=tmp_path / "log", error=BrokenError)}
    with RayPool(load) as pool:
        results = dict(pool.map(tasks))
    failure = results.pop("bad")
    assert isinstance(failure, TaskFailure)
    assert str(failure) == "given up after 3 attempts, the last ended with BrokenError: as ever"
    assert (tmp_path / "log").read_text() == "xxx"
    assert all(isinstance(result, int) for result in results.values())


def test_an_error_that_trying_again_would_not_mend_is_not_tried_again(tmp_path):
    with RayPool(load, final=(BrokenError,)) as pool:
        [(_, failure)] = pool.map({"bad": partial(fail, log=tmp_path / "log", error=BrokenError)})
    assert isinstance(failure.error, BrokenError)
    assert (tmp_path / "log").read_text() == "x"


def test_an_actor_that_dies_is_replaced_and_its_task_done_again(tmp_path):
    with RayPool(load, cpus_per_task=4) as pool:  # there is room for one only
        tasks = {str(i): partial(die_once, log=tmp_path / f"{i}") for i in range(3)}
        assert dict(pool.map(tasks)) == {str(i): "done" for i in range(3)}


def die(loaded) -> None:
    os._exit(1)


def test_a_task_that_always_kills_its_actor_is_given_up_and_the_others_are_done():
    with RayPool(load, cpus_per_task=4) as pool:  # there is room for one only
        results = dict(pool.map({"bad": die} | {str(i): pid for i in range(6)}))
    assert str(results.pop("bad")).startswith("given up after 3 attempts")
    assert len(results) == 6
    assert all(isinstance(result, int) for result in results.values())


def test_what_can_not_be_loaded_is_an_error_that_says_why():
    with RayPool(refuse_to_load) as pool, pytest.raises(ValueError, match=r"an actor can't start: .*no such model"):
        list(pool.map({"a": pid}))


def test_a_cluster_without_room_is_an_error_that_says_so():
    with RayPool(load, cpus_per_task=64) as pool, pytest.raises(ValueError, match=r"no node .* has 64 CPUs"):
        list(pool.map({"a": pid}))


def test_no_cluster_at_an_address_is_an_error_that_names_it():
    code = "from clipfilter_wds.offline.engines.ray_pool import RayPool; RayPool(dict, address='127.0.0.1:1')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: there is no Ray cluster at '127.0.0.1:1': " in run.stderr


@pytest.mark.slow
def test_ray_is_started_for_a_run_beside_the_one_that_another_run_has_started_for_itself():
    code = "from clipfilter_wds.offline.engines.ray_pool import RayPool; import ray; RayPool(dict); print(ray.nodes())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ray.nodes()[0]["NodeID"] not in run.stdout
    assert run.stdout.count("NodeID") == 1


@pytest.mark.slow
def test_two_actors_work_at_once_all_the_time(tmp_path):
    """Each task waits for another one to be worked on."""
    folders = [tmp_path / str(number // 2) for number in range(20)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    with RayPool(load, cpus_per_task=2) as pool:
        results = dict(pool.map({str(number): partial(meet, folder=folder) for number, folder in enumerate(folders)}))
    assert list(Counter(results.values()).values()) == [10, 10]
