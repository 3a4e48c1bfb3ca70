import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from clipfilter_wds.world import Agreement, World, ray_address
from tests.support.processes import run_ranks

READ_WORLD = "from clipfilter_wds.world import World; world = World.from_env(); print(world.rank, world.world_size)"


@given(st.integers(-5, 20), st.integers(-5, 20))
def test_rank_lies_in_the_world_or_is_refused_with_both_values(rank, world_size):
    if 0 <= rank < world_size:
        world = World(rank=rank, world_size=world_size)
        assert (world.rank, world.world_size) == (rank, world_size)
    else:
        with pytest.raises(ValueError, match=f"rank is {rank} and world_size {world_size}"):
            World(rank=rank, world_size=world_size)


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        ({"RANK": "2", "WORLD_SIZE": "4"}, World(rank=2, world_size=4)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            World(rank=5, world_size=8, local_rank=1, local_world_size=4),
        ),
        # srun; torchrun within it says more. A batch script is one process, whatever the job's size.
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
            World(rank=3, world_size=4, local_rank=1),
        ),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "0", "WORLD_SIZE": "1"}, World()),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, World()),
        # What a script exports that found none.
        ({"RANK": "", "WORLD_SIZE": ""}, World()),
        ({"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, World()),
        ({"RANK": " ", "WORLD_SIZE": "", "SLURM_PROCID": "", "SLURM_STEP_NUM_TASKS": ""}, World()),
        ({"RANK": "", "WORLD_SIZE": "", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, World(rank=1, world_size=2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""}, World(rank=1, world_size=2)),
        # What a DataLoader worker may see: never a guess at a rank.
        ({"WORLD_SIZE": "4"}, World()),
        ({"RANK": "1"}, World()),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, World()),
    ],
)
def test_the_world_is_read_from_rank_and_world_size_together(environ, world):
    assert World.from_env(environ) == world


@pytest.mark.parametrize("environ", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "one", "WORLD_SIZE": "2"}])
def test_an_impossible_environment_is_refused(environ):
    with pytest.raises(ValueError, match=r"rank is 4|'one'"):
        World.from_env(environ)


def test_the_world_is_read_without_torch():
    code = f"{READ_WORLD}; import sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split()[-1] == "False"


def test_a_process_reads_its_own_environment():
    environ = {**os.environ, "RANK": "1", "WORLD_SIZE": "3"}
    run = subprocess.run([sys.executable, "-c", READ_WORLD], env=environ, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "3"]


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"RANK": "", "WORLD_SIZE": "4"}, "RANK=''"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK='zero'"),
        ({"RANK": "0", "WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"}, "LOCAL_RANK='a'"),
        ({"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID='x'"),
    ],
)
def test_a_variable_without_a_number_is_named(environ, name):
    with pytest.raises(ValueError, match=f"the environment has {name}.*`unset {name.partition('=')[0]}`"):
        World.from_env(environ)


@pytest.mark.parametrize(
    ("environ", "address"),
    [({}, None), ({"RAY_ADDRESS": ""}, None), ({"RAY_ADDRESS": "10.0.0.1:6379"}, "10.0.0.1:6379")],
)
def test_a_ray_cluster_is_the_one_that_the_environment_names(environ, address):
    assert ray_address(environ) == address


def test_ranks_agree_whatever_the_default_device_of_a_training_script():
    assert run_ranks(2, lowest_and_all) == [(0, [0, 1]), (0, [0, 1])]


def lowest_and_all() -> tuple[int, list[int]]:
    agreement, rank = Agreement(World.current()), World.current().rank
    torch.set_default_device("meta")
    return agreement.lowest(rank), agreement.gather(rank)
