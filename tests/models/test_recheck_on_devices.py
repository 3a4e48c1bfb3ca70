"""Scores and decisions are float32's on a GPU too, also while it is busy and memory is used again."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.training.scoring import score_batches
from tests.support.gpu import DEVICES, fast_precision
from tests.support.toys import encoded, make_clip, photo

BATCH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough for the errors of low precision to be those of real models."""
    return make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def fast(device, folder):
    return ClipScorer(folder, device=device, precision=fast_precision(device))


@pytest.fixture(scope="module")
def exact(device, folder):
    return ClipScorer(folder, device=device, precision="fp32")


@pytest.fixture(scope="module")
def inputs(exact):
    captions = [f"{'word ' * (seed % 9)}number {seed}" if seed % 4 else "the same again" for seed in range(160)]
    pairs = [exact.preprocess.open_pair(encoded(photo(seed)), caption) for seed, caption in enumerate(captions)]
    pixel_values, tokens = exact.preprocess.collate(pairs)
    return pixel_values, tokens.input_ids


@pytest.fixture(scope="module")
def reference(exact, inputs) -> np.ndarray:
    """Scores in float32, on the device."""
    return exact(*inputs).cpu().numpy()


@pytest.fixture(scope="module")
def on_a_score(reference) -> float:
    """A threshold that keeps about half of the pairs, and is the score of one of them."""
    return float(np.sort(reference)[len(reference) // 2])


@contextmanager
def busy(device):
    """The device has work on other streams, and the host's threads have to take turns."""
    ended, side = threading.Event(), 1024 if device == "cuda" else 64

    def work() -> None:
        numbers = torch.randn(side, side, device=device)
        stream = torch.cuda.Stream() if device == "cuda" else None
        with torch.cuda.stream(stream):
            while not ended.is_set():
                for _ in range(20):
                    numbers = (numbers @ numbers).tanh()
                numbers.sum().item()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def scores_of(recheck, inputs, score=None) -> np.ndarray:
    """Scores of all samples, in batches whose memory is filled with other numbers as soon as it may be."""
    memory = [part[:BATCH].clone() for part in inputs]
    if recheck.scorer.device.type == "cuda":
        memory = [part.pin_memory() for part in memory]
    free = [memory]

    def put(batch) -> list[torch.Tensor]:
        place = free.pop() if free else [part.clone() for part in memory]
        for to, part in zip(place, batch, strict=True):
            to.copy_(part)
        return place

    def hold(place, may_be_kept) -> None:
        for part in place:
            part.fill_(1)
        free.append(place)

    batches = map(put, zip(*(part.split(BATCH) for part in inputs), strict=True))
    if score is not None:
        return np.concatenate([scores for _, scores, _ in score(recheck, batches, tuple, hold)])
    return np.concatenate([scores.scores for _, scores in recheck.map(batches, tuple, hold)])


def test_float32_scores_are_those_of_a_cpu(folder, exact, reference, inputs):
    on_cpu = ClipScorer(folder, device="cpu", precision="fp32")
    np.testing.assert_allclose(reference, on_cpu(*inputs).numpy(), rtol=0, atol=1e-5)


def test_decisions_are_float32s_at_thresholds_that_lie_on_its_scores(fast, reference, inputs):
    alone = fast(*inputs).cpu().numpy()
    num_different = num_rechecked = 0
    thresholds = [float(score) for score in reference if score > 0][:30:3]
    for threshold in [*thresholds, *np.nextafter(np.float32(thresholds[:2]), np.float32(2)).tolist()]:
        scores = Recheck(fast, threshold)(*inputs)
        np.testing.assert_array_equal(COSINES.passes(scores.scores, threshold), COSINES.passes(reference, threshold))
        num_different += (COSINES.passes(alone, threshold) != COSINES.passes(reference, threshold)).sum()
        num_rechecked += scores.num_rechecked
    assert num_different  # the fast scores alone would have decided otherwise
    assert num_rechecked < len(thresholds) * len(reference) / 2


def test_batches_whose_memory_is_used_again_are_decided_as_float32_does(fast, reference, inputs, on_a_score):
    scores = scores_of(Recheck(fast, on_a_score), inputs)
    np.testing.assert_array_equal(COSINES.passes(scores, on_a_score), COSINES.passes(reference, on_a_score))
    np.testing.assert_allclose(scores, reference, rtol=0, atol=0.02)


@pytest.mark.parametrize("around", [torch.bfloat16, torch.float16])
def test_autocast_around_changes_no_bit(device, fast, inputs, on_a_score, around):
    recheck = Recheck(fast, on_a_score)
    expected = recheck(*inputs).scores
    with torch.autocast(device, around):
        under_autocast = Recheck(fast, on_a_score)
        np.testing.assert_array_equal(under_autocast(*inputs).scores, expected)
    assert under_autocast.band == recheck.band


@pytest.mark.parametrize("beside_training", [False, True])
def test_so_are_they_while_the_device_is_busy(device, fast, reference, inputs, on_a_score, beside_training):
    fast.warm_up(BATCH)
    with busy(device):
        for _ in range(5 if device == "cuda" else 1):
            found = []
            score = score_batches if beside_training else None
            work = lambda found=found, score=score: found.append(  # noqa: E731
                scores_of(Recheck(fast, on_a_score), inputs, score)
            )
            thread = threading.Thread(target=work)  # as a loader scores
            thread.start()
            thread.join()
            [scores] = found
            np.testing.assert_array_equal(COSINES.passes(scores, on_a_score), COSINES.passes(reference, on_a_score))
            np.testing.assert_allclose(scores, reference, rtol=0, atol=0.02)
