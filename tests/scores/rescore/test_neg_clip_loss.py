"""negCLIPLoss equals its definition, computed in float64 from the formula of arXiv 2405.19547."""

import numpy as np
import pytest
import torch

from clipfilter_wds.scores.rescore.neg_clip_loss import NegClipLoss
from clipfilter_wds.scores.rescore.row_sample import NOT_SAMPLED
from tests.support.embeddings import unit_rows

CPU = torch.device("cpu")
NUM_ROWS, NUM_BATCHES, BATCH_SIZE = 700, 3, 100


@pytest.fixture(params=[np.float32, np.float16])
def pairs(request) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = unit_rows(rng, NUM_ROWS, 24, dtype=request.param)
    texts = images + 0.3 * unit_rows(rng, NUM_ROWS, 24)
    return images, (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(request.param)


def definition(images, texts, batches, temperature) -> np.ndarray:
    """One sum after the other, in float64; no rescaling."""
    similarities = images.astype(np.float64) @ texts.astype(np.float64).T
    scores = []
    for i in range(len(images)):
        loss = 0.0
        for batch in batches:
            members = sorted({*batch, i})
            to_texts = sum(np.exp(similarities[i, j] / temperature) for j in members)
            to_images = sum(np.exp(similarities[j, i] / temperature) for j in members)
            loss += temperature / 2 * (np.log(to_texts) + np.log(to_images))
        scores.append(similarities[i, i] - loss / len(batches))
    return np.array(scores)


def computed(images, texts, batches, temperature) -> np.ndarray:
    members = np.concatenate(batches)
    places = np.full(len(images), NOT_SAMPLED)
    places[members] = np.arange(len(members))
    method = NegClipLoss(images[members], texts[members], num_batches=len(batches), temperature=temperature, device=CPU)
    return method(images, texts, places)


def some_batches() -> list[np.ndarray]:
    chosen = np.random.default_rng(1).permutation(NUM_ROWS)[: NUM_BATCHES * BATCH_SIZE]
    return np.split(chosen, NUM_BATCHES)


def test_pairs_without_embeddings_are_in_no_batch(pairs):
    """Cosines are negative, as some models' are, so that an embedding of zeros would be nearer than any other."""
    images, texts = pairs[0].copy(), -pairs[1]
    batches = some_batches()
    images[batches[0][:5]] = texts[batches[0][:5]] = 0
    images[batches[2]] = texts[batches[2]] = 0
    whole = [batches[0][5:], batches[1], batches[2][:0]]
    rest = np.flatnonzero(images.any(1))
    scores = computed(images, texts, batches, 0.07)
    np.testing.assert_allclose(scores[rest], definition(images, texts, whole, 0.07)[rest], atol=1e-5)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_scores_equal_the_definition(pairs, temperature):
    scores = computed(*pairs, some_batches(), temperature)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, definition(*pairs, some_batches(), temperature), atol=1e-5, rtol=0)
    assert scores.max() <= 0


def test_a_batch_of_all_is_minus_the_contrastive_loss(pairs):
    """As training computes it: cross entropy of both directions."""
    images, texts = (torch.from_numpy(each).double() for each in pairs)
    logits = images @ texts.T / 0.05
    own = torch.arange(NUM_ROWS)
    loss = [torch.nn.functional.cross_entropy(each, own, reduction="none") for each in (logits, logits.T)]
    scores = computed(*pairs, [np.arange(NUM_ROWS)], 0.05)
    np.testing.assert_allclose(scores, -0.05 * (loss[0] + loss[1]).numpy() / 2, atol=1e-5, rtol=0)


def test_blocks_change_nothing_but_rounding(pairs, monkeypatch):
    whole = computed(*pairs, some_batches(), 0.01)
    monkeypatch.setattr("clipfilter_wds.scores.rescore.blocks._CPU_BLOCK", (64, 33))
    np.testing.assert_allclose(computed(*pairs, some_batches(), 0.01), whole, atol=2e-6, rtol=0)


def test_a_temperature_whose_exponentials_overflow_gives_finite_scores(pairs):
    scores = computed(*pairs, some_batches(), 0.0005)
    assert np.log(np.finfo(np.float32).max) < 1 / 0.0005
    assert np.isfinite(scores).all()


def test_a_run_of_one_pair_scores_zero():
    one = unit_rows(np.random.default_rng(0), 1, 8)
    assert computed(one, one, [np.array([0])], 0.01) == pytest.approx([0.0], abs=1e-6)


def test_captions_that_fit_every_image_are_told_from_true_ones():
    """By the cosine they can hardly be: they are near to what all images have in common."""
    rng, common = np.random.default_rng(0), np.eye(64)[0]
    images = _unit(unit_rows(rng, NUM_ROWS, 64) + 0.5 * common)
    texts = images + 2.0 * unit_rows(rng, NUM_ROWS, 64)
    generic = np.arange(0, NUM_ROWS, 5)
    texts[generic] = common + 0.5 * unit_rows(rng, len(generic), 64)
    texts = _unit(texts)

    def auc(scores: np.ndarray) -> float:
        return float((scores[generic][:, None] < np.delete(scores, generic)).mean())

    assert auc((images * texts).sum(1)) < 0.65
    assert auc(computed(images, texts, some_batches(), 0.05)) > 0.9


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
