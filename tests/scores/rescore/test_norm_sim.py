"""NormSim equals its definition, computed in float64 from the formula of arXiv 2405.19547."""

import numpy as np
import pytest
import torch

from clipfilter_wds.scores.rescore.norm_sim import NormSim2, NormSimInf
from tests.support.embeddings import unit_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("method", [NormSim2, NormSimInf])
def test_scores_equal_the_definition(method, dtype, monkeypatch):
    monkeypatch.setattr("clipfilter_wds.scores.rescore.blocks._CPU_BLOCK", (64, 50))
    rng = np.random.default_rng(0)
    images, targets = unit_rows(rng, 150, 24, dtype=dtype), unit_rows(rng, 333, 24, dtype=dtype)
    products = np.abs(images.astype(np.float64) @ targets.astype(np.float64).T)
    expected = np.sqrt((products**2).sum(1)) if method is NormSim2 else products.max(1)
    scores = method(np.split(targets, [100, 101]), CPU)(images)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)


def test_images_like_the_targets_score_higher():
    rng = np.random.default_rng(0)
    centres = unit_rows(rng, 2, 32)
    targets = unit_rows(rng, 200, 32, centres=centres[:1])
    alike, others = (unit_rows(rng, 50, 32, centres=centres[[which]]) for which in (0, 1))
    for method in (NormSim2, NormSimInf):
        scores = method([targets], CPU)
        assert scores(alike).min() > scores(others).max()
