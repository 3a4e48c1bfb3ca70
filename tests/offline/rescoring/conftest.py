"""Four shards with embeddings, and what was derived of them."""

import numpy as np
import pytest

from clipfilter_wds.offline.rescoring.config import RescoreConfig
from clipfilter_wds.offline.rescoring.run import rescore_shards
from clipfilter_wds.scores.table import ShardScores
from tests.support.embeddings import pair_embeddings, write_scored

NAMES = ["00000", "00001", "a/00002", "a/00003"]
NEG = {"method": "neg_clip_loss", "num_batches": 3, "batch_size": 20}


@pytest.fixture(scope="package")
def scored(tmp_path_factory):
    """Four shards with embeddings."""
    rng = np.random.default_rng(0)
    embeddings = {name: pair_embeddings(rng, 40 + number, 16) for number, name in enumerate(NAMES)}
    return write_scored(tmp_path_factory.mktemp("scored"), embeddings)


@pytest.fixture(scope="package")
def derived(scored, tmp_path_factory):
    """The same shards by negCLIPLoss."""
    folder = tmp_path_factory.mktemp("derived")
    rescore_shards(RescoreConfig(scores=scored, output=folder, **NEG))
    return folder


def tables(folder) -> dict[str, ShardScores]:
    return {name: ShardScores.read(folder / f"{name}.parquet") for name in NAMES}


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}
