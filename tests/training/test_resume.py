from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.keep_rate import StarvationError
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
