"""A loader gives the same batches on a GPU as on a CPU, beside training, with workers, and after a resume."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from tests.support.gpu import DEVICES, fast_precision
from tests.support.toys import make_clip, pair, write_shard

NUM_SHARDS, PER_SHARD = 3, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for shard in range(NUM_SHARDS):
        write_shard(folder / f"{shard}.tar", [pair(1000 * shard + i) for i in range(PER_SHARD)], start=1000 * shard)
    return f"{folder}/*.tar"


@pytest.fixture(scope="module", params=DEVICES)
def fast(request, folder):
    return ClipScorer(folder, device=request.param, precision=fast_precision(request.param))


@pytest.fixture(scope="module")
def all_scores(folder, shards) -> dict[str, float]:
    """Of all pairs, in float32 on a CPU."""
    scorer = ClipScorer(folder, device="cpu", precision="fp32")
    loader = ClipFilterLoader(ClipWebDataset(shards, scorer.preprocess), scorer, threshold=None)
    return {key: float(score) for batch in loader for key, score in zip(batch["__key__"], batch["score"], strict=True)}


@pytest.fixture(scope="module")
def threshold(all_scores) -> float:
    """In the widest gap between scores about the middle, so that the float32 of any device decides alike."""
    scores = np.sort([*all_scores.values()])[len(all_scores) // 3 : -len(all_scores) // 3]
    widest = int(np.diff(scores).argmax())
    return float(scores[widest : widest + 2].mean())


def loader_of(scorer, shards, threshold, **options):
    dataset = ClipWebDataset(shards, scorer.preprocess, shuffle=10)
    options = {"batch_size": 8, "score_batch_size": 16, "num_workers": 2, **options}
    return ClipFilterLoader(dataset, scorer, threshold=threshold, **options)


def train_on(batch, device) -> float:
    """Keep the device busy on the stream that training uses; the mean of the images as they have come there."""
    images = batch["image"].to(device, non_blocking=True).float()
    side = 1024 if device.type == "cuda" else 32
    numbers = torch.randn(side, side, device=device)
    for _ in range(50):
        numbers = (numbers @ numbers).tanh()
    return float(images.mean() + 0 * numbers.mean())


def test_what_is_kept_is_what_float32_keeps_though_training_uses_the_device(fast, shards, threshold, all_scores):
    found, means = {}, []
    for batch in loader_of(fast, shards, threshold):
        means.append((train_on(batch, fast.device), float(batch["image"].float().mean())))
        assert batch["image"].is_pinned() == torch.cuda.is_available()
        found |= dict(zip(batch["__key__"], batch["score"].tolist(), strict=True))
    assert found.keys() == {key for key, score in all_scores.items() if score >= threshold}
    assert found == pytest.approx({key: all_scores[key] for key in found}, abs=0.02)
    for there, here in means:
        assert there == pytest.approx(here, rel=1e-3)


def test_a_loader_resumes_after_any_batch(fast, shards, threshold):
    whole = [batch["__key__"] for batch in loader_of(fast, shards, threshold)]
    for stop in range(1, len(whole), 2):
        stopped = loader_of(fast, shards, threshold)
        batches = iter(stopped)
        assert [batch["__key__"] for batch in islice(batches, stop)] == whole[:stop]
        state = json.loads(json.dumps(stopped.state_dict()))
        batches.close()
        resumed = loader_of(fast, shards, threshold)
        resumed.load_state_dict(state)
        assert [batch["__key__"] for batch in resumed] == whole[stop:]
