"""Prepares the dropping of near-duplicates."""

import numpy as np
import torch

from clipfilter_wds.offline.rescoring.config import DedupConfig
from clipfilter_wds.offline.rescoring.method import Method, OnPreparing, Preparing, Rescored, drop
from clipfilter_wds.offline.rescoring.same_embeddings import check_images
from clipfilter_wds.offline.rescoring.sources import Sources, SourceShard
from clipfilter_wds.scores.rescore.clustered_search import import_faiss
from clipfilter_wds.scores.rescore.near_duplicates import Search, near_duplicates
from clipfilter_wds.types import DropReason

#: Up to how many images all are compared with all.
_EXACT_ON_CPU, _EXACT_ON_GPU = 200_000, 2_000_000


def dedup(config: DedupConfig, sources: Sources, device: torch.device, on_preparing: OnPreparing) -> Method:
    """Find the near-duplicates of the whole run. Holds the embeddings of all images, in clusters twice.

    Raises:
        ValueError: When there are no embeddings, they are not of the images that were scored, or faiss is needed and
            not installed.
    """
    check_images(sources)
    scores = [shard.usable_scores[0] for shard in sources.shards]
    search = _search(config, sum(map(len, scores)), device)
    starts = np.cumsum([0, *map(len, scores)])
    # Stable: equal scores are in order of shard and index.
    order = np.argsort(-np.concatenate(scores), kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))

    embeddings = np.empty((len(order), sources.saved.dim), dtype=sources.saved.dtype)
    for shard in sources.shards:
        rows = slice(starts[shard.number], starts[shard.number + 1])
        embeddings[place[rows]] = shard.embeddings.image[shard.usable]

    def on_progress(num_rows: int) -> None:
        on_preparing(Preparing("comparing", num_rows, len(order), "images"))

    dropped = near_duplicates(embeddings, config.similarity, search=search, device=device, on_progress=on_progress)
    dropped = dropped[place]

    def score(shard: SourceShard) -> Rescored:
        return drop(shard, dropped[starts[shard.number] : starts[shard.number + 1]], DropReason.NEAR_DUPLICATE)

    settings = {
        "method": "dedup",
        "similarity": config.similarity,
        "search": search,
        "embeddings": sources.saved.dtype,
        "tables": sources.digest(),
    }
    return Method(score=score, settings=settings)


def _search(config: DedupConfig, num_images: int, device: torch.device) -> Search:
    search = config.search
    if search == "auto":
        limit = _EXACT_ON_CPU if device.type == "cpu" else _EXACT_ON_GPU
        search = "exact" if num_images <= limit else "clustered"
    if search == "clustered":
        import_faiss()  # not to find out after all embeddings are read that it is missing
    return search
