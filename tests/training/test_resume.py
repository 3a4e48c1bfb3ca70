from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.training.resume import share_out
from clipfilter_wds.training.state import LoaderState
from clipfilter_wds.types import FilterStats
from clipfilter_wds.world import World
from tests.support.lockstep import Job, begin, keys_of, run, saved
from tests.support.toys import encoded, write_shard

SIZES = [9, 0, 14, 3, 11, 1, 8, 6]
PAIR = {"png": encoded(Image.new("RGB", (1, 1)), "PNG"), "txt": b"a dot"}

topologies = st.tuples(st.integers(1, 8), st.integers(0, 4))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    return [
        str(write_shard(folder / f"{number}.tar", [PAIR] * size, start=100 * number))
        for number, size in enumerate(SIZES)
    ]


@st.composite
def jobs(draw, **options):
    """Everything about a job but its shards."""
    num_shards = draw(st.integers(1, len(SIZES)))
    all_keys = [f"{100 * shard + number:09d}" for shard in range(num_shards) for number in range(SIZES[shard])]
    share = draw(st.sampled_from([0.01, 0.5, 1.0]))
    kept = [key for key in all_keys if share == 1.0 or draw(st.floats(0, 1)) < share]
    return {
        "num_shards": num_shards,
        "kept": frozenset(kept or all_keys[:1]),
        "shuffle": draw(st.sampled_from([0, 1, 4, 100])),
        "batch_size": draw(st.integers(1, 4)),
        **options,
    }


def job_of(shards, recipe, **options):
    dataset = ClipWebDataset(
        shards[: recipe["num_shards"]],
        shuffle=recipe["shuffle"],
        image_transform=lambda image: image.size[0],
        layout=SampleLayout(),
    )
    config = LoaderConfig(threshold=0.5, batch_size=recipe["batch_size"], **options)
    return Job(dataset=dataset, config=config, kept=recipe["kept"])


@settings(max_examples=50, deadline=None)
@given(
    recipe=jobs(),
    num_streams=st.none() | st.integers(0, 12),
    before=topologies,
    between=topologies,
    after=topologies,
    steps=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    data=st.data(),
)
def test_an_epoch_resumed_twice_on_any_topology_gives_each_kept_sample_once(
    shards, recipe, num_streams, before, between, after, steps, data
):
    most = max(before[0], between[0], after[0])
    job = job_of(shards, recipe, num_streams=None if num_streams is None else most + num_streams)
    read, states = [], []
    for topology, num_steps in zip((before, between, after), (*steps, None), strict=True):
        ranks = begin(job, *topology, states)
        run(ranks, num_steps)
        again = begin(job, *topology, data.draw(st.permutations(states)))
        run(again, num_steps)
        assert [rank.given for rank in again] == [rank.given for rank in ranks]  # a pure function of the states
        read += keys_of(ranks)
        states = saved(ranks)
    assert len(read) == len(set(read))
    rest = begin(job, 1, 0, states)
    run(rest)
    assert sorted(read + keys_of(rest)) == sorted(job.kept)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    recipe=jobs(),
    num_streams=st.integers(0, 8),
    before=topologies,
    between=topologies,
    after=topologies,
    steps=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
)
def test_an_endless_stream_gives_each_pass_once_and_in_order_on_any_topology(
    shards, recipe, num_streams, before, between, after, steps
):
    most = max(before[0], between[0], after[0])
    job = job_of(shards, recipe, num_streams=most + num_streams, end="repeat", batches_per_epoch=1000)
    read, states = [], []
    try:
        for topology, num_steps in zip((before, between, after), steps, strict=True):
            ranks = begin(job, *topology, states)
            run(ranks, num_steps)
            read += keys_of(ranks)
            states = saved(ranks)
    except StarvationError:
        assume(False)  # a rank whose streams keep nothing
    expected = Counter()
    for rank in ranks:
        topology = rank.state.progress.topology
        for stream, progress in rank.state.progress.streams.items():
            expected.update(job.keys_before(topology, stream, progress))
    assert Counter(read) == expected


def states_of(recipe, num_batches=2):
    """The states of all ranks of a job after so many batches."""
    ranks = begin(recipe, 3, 2)
    run(ranks, num_batches)
    return saved(ranks)


@pytest.fixture(scope="module")
def job(shards):
    keys = frozenset(f"{100 * shard + number:09d}" for shard, size in enumerate(SIZES) for number in range(size))
    return job_of(shards, {"num_shards": len(SIZES), "kept": keys, "shuffle": 4, "batch_size": 2})


@pytest.mark.parametrize(
    ("chosen", "world_size", "message"),
    [
        ([], 3, "there is no state in the list"),
        ([0], 2, r"the state of rank 0 of 3: .* takes a list of the states of all of them, each once"),
        ([0, 1], 2, "the state of rank 0, 1 of 3"),
        ([0, 1, 1], 2, "the state of rank 0, 1, 1 of 3"),
        ([0, 1, 2, 2], 3, "the state of rank 0, 1, 2, 2 of 3"),
    ],
)
def test_states_that_are_not_each_stream_once_are_refused(job, chosen, world_size, message):
    states = [LoaderState.from_json(state) for state in states_of(job)]
    topology = job.dataset.topology(World(rank=0, world_size=world_size), 1)
    with pytest.raises(ValueError, match=message):
        share_out([states[number] for number in chosen], topology)


def test_the_state_of_another_rank_is_refused_and_that_of_the_same_rank_taken(job):
    states = [LoaderState.from_json(state) for state in states_of(job)]
    for rank in range(3):
        topology = job.dataset.topology(World(rank=rank, world_size=3), 2)
        for number, state in enumerate(states):
            if number == rank:
                assert share_out([state], topology) == state
            else:
                with pytest.raises(ValueError, match=f"the state of rank {number} of 3"):
                    share_out([state], topology)


def test_the_state_of_a_lone_rank_is_enough_for_any_number(job):
    ranks = begin(job, 1, 4)
    run(ranks, 2)
    several = begin(job, 3, 1, saved(ranks))
    run(several)
    rest = begin(job, 1, 0, saved(several))
    run(rest)
    assert sorted(keys_of(ranks) + keys_of(several) + keys_of(rest)) == sorted(job.kept)


def test_states_of_different_moments_are_refused_with_both(job):
    earlier, later = states_of(job, 1), states_of(job, 2)
    states = [LoaderState.from_json(state) for state in (earlier[0], *later[1:])]
    topology = job.dataset.topology(World(rank=0, world_size=2), 1)
    with pytest.raises(ValueError, match=r"epoch 0 after 1 batches, .*; epoch 0 after 2 batches, .* the same batch"):
        share_out(states, topology)


def test_counts_are_kept_whoever_resumes(job):
    states = states_of(job)
    counted = sum((LoaderState.from_json(state).progress.stats for state in states), start=FilterStats())
    for world_size in (1, 2, 5):
        ranks = begin(job, world_size, 0, states)
        assert sum((rank.state.progress.stats for rank in ranks), start=FilterStats()) == counted


def test_an_endless_stream_is_not_resumed_on_more_ranks_than_it_has_streams(shards, job):
    endless = Job(
        dataset=job.dataset,
        config=LoaderConfig(threshold=0.5, batch_size=2, end="repeat", batches_per_epoch=9),
        kept=job.kept,
    )
    ranks = begin(endless, 2, 1)
    run(ranks, 1)
    with pytest.raises(ValueError, match="the state has num_streams=2, too few for 3 ranks; resume on fewer"):
        begin(endless, 3, 1, saved(ranks))
