"""What torch was told of float32 changes no derived table."""

import numpy as np
import pytest
import torch

from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig
from clipfilter_wds.offline.rescoring.run import rescore_shards
from tests.support.embeddings import pair_embeddings, write_scored


@pytest.fixture
def told():
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("method", ["neg_clip_loss", "norm_sim_inf", "dedup"])
def test_products_are_float32s_whatever_torch_was_told(tmp_path, told, method):
    scored = write_scored(tmp_path / "scored", {"0": pair_embeddings(np.random.default_rng(0), 600, 64)})

    def tables(output) -> list[bytes]:
        if method == "dedup":
            config = DedupConfig(scores=scored, output=output, similarity=0.5)
        else:
            target = scored if method == "norm_sim_inf" else None
            config = RescoreConfig(scores=scored, output=output, method=method, target=target)
        rescore_shards(config)
        return [path.read_bytes() for path in sorted(output.rglob("*.parquet"))]

    expected = tables(tmp_path / "highest")
    for precision in ("high", "medium"):
        told(precision)
        assert tables(tmp_path / precision) == expected
        assert torch.get_float32_matmul_precision() == precision
