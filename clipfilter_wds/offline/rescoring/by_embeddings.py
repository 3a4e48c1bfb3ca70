"""Prepares the methods that score by embeddings: negCLIPLoss and NormSim."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from clipfilter_wds.offline.rescoring.config import RescoreConfig
from clipfilter_wds.offline.rescoring.method import Method, OnPreparing, Preparing, Rescored, reasons_of
from clipfilter_wds.offline.rescoring.same_embeddings import check_images, check_pairs, check_target
from clipfilter_wds.offline.rescoring.sources import Sources, SourceShard
from clipfilter_wds.scores.kind import ScoreKind
from clipfilter_wds.scores.rescore.neg_clip_loss import NegClipLoss
from clipfilter_wds.scores.rescore.norm_sim import NormSim2, NormSimInf
from clipfilter_wds.scores.rescore.row_sample import RowSample, RowSampler


def neg_clip_loss(config: RescoreConfig, sources: Sources, device: torch.device, on_preparing: OnPreparing) -> Method:
    """Draw the batches from all shards, and hold their embeddings.

    Raises:
        ValueError: When there is no temperature, nothing to draw, or the embeddings are not of what was scored.
    """
    check_pairs(sources)
    saved = sources.saved
    temperature = config.temperature if config.temperature is not None else saved.temperature
    if temperature is None:
        raise ValueError("the tables name no temperature; give --temperature, such as 0.01")
    size = config.num_batches * config.batch_size
    sampler = RowSampler(size, config.seed)
    for shard in sources.shards:
        sampler.add(shard.name, np.flatnonzero(shard.usable))
        on_preparing(Preparing("drawing batches", shard.number + 1, len(sources), "shards"))
    sample = sampler.finish()
    if not len(sample):
        raise ValueError("none of the samples has a score; there is nothing to rescore")
    images, texts = _gather(sample, sources)
    loss = NegClipLoss(
        images,
        texts,
        num_batches=config.num_batches if len(sample) == size else 1,
        temperature=temperature,
        device=device,
    )

    def score(shard: SourceShard) -> Rescored:
        rows = np.flatnonzero(shard.usable)
        places = sample.places_in(shard.number, len(shard.usable))[rows]
        images, texts = shard.embeddings.image[rows], shard.embeddings.text[rows]
        return Rescored(scores=_less_empty(loss(images, texts, places), images), reasons=reasons_of(shard))

    drawn = hashlib.sha256(images.view(np.uint8).data)
    drawn.update(texts.view(np.uint8).data)
    made_of = {"temperature": temperature, "embeddings": saved.dtype, "batches": drawn.hexdigest()}
    settings = {**config.settings, **made_of}
    return Method(score=score, settings=settings, kind=ScoreKind("neg_clip_loss", None, 0.0))


def norm_sim(config: RescoreConfig, sources: Sources, device: torch.device, on_preparing: OnPreparing) -> Method:
    """Read the target images' embeddings.

    Raises:
        ValueError: When there are none, or they can't be compared with those of the sources.
    """
    assert config.target is not None
    targets = Sources([config.target])
    check_images(sources)
    check_target(targets, sources)
    if not any(shard.usable.any() for shard in targets.shards):
        raise ValueError(
            f"no image of the target {str(config.target)!r} could be scored; there is nothing to be near to"
        )
    digest = hashlib.sha256()

    def read() -> Iterator[np.ndarray]:
        for shard in targets.shards:
            rows = shard.embeddings.image[shard.usable]
            digest.update(rows.tobytes())
            on_preparing(Preparing("reading the target", shard.number + 1, len(targets), "shards"))
            yield rows

    similarity = (NormSim2 if config.method == "norm_sim_2" else NormSimInf)(read(), device)

    def score(shard: SourceShard) -> Rescored:
        images = shard.embeddings.image[shard.usable]
        return Rescored(scores=_less_empty(similarity(images), images), reasons=reasons_of(shard))

    settings = {**config.settings, "embeddings": sources.saved.dtype, "target": digest.hexdigest()}
    return Method(score=score, settings=settings, kind=ScoreKind(config.method, 0.0, None))


def _less_empty(scores: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """NaN for samples without an embedding: the fast pass gave no finite one, and the score is one of float32."""
    scores[~embeddings.any(axis=1)] = np.nan
    return scores


def _gather(sample: RowSample, sources: Sources) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of a sample's images and captions, ``[M, D]`` each, in its order."""
    images, texts = (np.empty((len(sample), sources.saved.dim), dtype=sources.saved.dtype) for _ in range(2))
    for number in np.unique(sample.shards).tolist():
        places, indices = sample.of_shard(number)
        embeddings = sources.shard(number).embeddings
        images[places], texts[places] = embeddings.image[indices], embeddings.text[indices]
    return images, texts
