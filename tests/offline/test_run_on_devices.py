"""`rewrite` keeps what float32 keeps on a GPU too, resumes bit for bit, and two processes may share one GPU."""

import numpy as np
import pytest

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.world import World
from tests.support.gpu import DEVICES, fast_precision
from tests.support.outputs import bits, check_accounting
from tests.support.pace import FOREVER
from tests.support.processes import run_ranks
from tests.support.toys import make_clip, pair, write_shard

NUM_SHARDS, PER_SHARD = 5, 40
OPTIONS = {"batch_size": 16, "num_workers": 2, "embeddings": "fp16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for shard in range(NUM_SHARDS):
        write_shard(folder / f"{shard:05d}.tar", [pair(1000 * shard + i) for i in range(PER_SHARD)])
    return f"{folder}/*.tar"


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def fast(device, folder):
    return ClipScorer(folder, device=device, precision=fast_precision(device))


@pytest.fixture(scope="module")
def exact(device, folder, shards, tmp_path_factory):
    """Scores of all shards in float32 on the device."""
    output = tmp_path_factory.mktemp("exact")
    scorer = ClipScorer(folder, device=device, precision="fp32")
    process_shards(ScoreConfig(shards=shards, output=output, batch_size=16, num_workers=0), scorer)
    return {path.stem: ShardScores.read(path) for path in sorted(output.rglob("*.parquet"))}


@pytest.fixture(scope="module")
def threshold(exact) -> float:
    """The float32 score of a sample, so that others lie within the band around it."""
    scores = np.sort(np.concatenate([table.scores for table in exact.values()]))
    return float(scores[len(scores) // 2])


@pytest.fixture(scope="module")
def whole(fast, shards, threshold, tmp_path_factory):
    """What a run that nobody stops writes."""
    output = tmp_path_factory.mktemp("whole")
    process_shards(RewriteConfig(shards=shards, output=output, threshold=threshold, **OPTIONS), fast)
    return output


def test_what_is_kept_is_what_float32_keeps_at_a_threshold_that_lies_on_a_score(whole, exact, threshold):
    check_accounting(whole)
    tables = {path.stem: ShardScores.read(path) for path in sorted(whole.rglob("*.parquet"))}
    assert tables.keys() == exact.keys()
    assert sum(table.metadata.rechecked for table in tables.values()) > 0
    for name, table in tables.items():
        np.testing.assert_array_equal(select(table, threshold).keep, select(exact[name], threshold).keep)


class Stop(Exception):  # noqa: N818  # it is no error
    pass


def test_a_run_that_was_stopped_resumes_to_the_same_bits(fast, shards, threshold, whole, tmp_path):
    config = RewriteConfig(shards=shards, output=tmp_path, threshold=threshold, **OPTIONS)

    def stop(tally) -> None:
        if tally.num_scored >= 2.5 * PER_SHARD and bits(tmp_path):  # shards are written by other processes
            raise Stop

    with pytest.raises(Stop):
        process_shards(config, fast, on_progress=stop)
    assert 0 < len(bits(tmp_path)) < len(bits(whole))
    process_shards(config, fast)
    assert bits(tmp_path) == bits(whole)


def test_two_processes_share_a_device_and_write_the_same_bits(device, folder, shards, threshold, whole, tmp_path):
    run_ranks(2, _rewrite_rank, folder, device, shards, threshold, tmp_path)
    assert bits(tmp_path) == bits(whole)
    check_accounting(tmp_path)


def _rewrite_rank(folder, device, shards, threshold, output) -> None:
    world = World.current()
    world.claim_gpu()
    scorer = ClipScorer(folder, device=device, precision=fast_precision(device))
    config = RewriteConfig(shards=shards, output=output, threshold=threshold, **OPTIONS)
    process_shards(config, scorer, world=world, rank_timeout=FOREVER)
