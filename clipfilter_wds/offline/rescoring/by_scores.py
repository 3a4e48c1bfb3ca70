"""Prepares the methods that combine the scores of several folders."""

from collections.abc import Iterator

import numpy as np

from clipfilter_wds.offline.rescoring.config import RescoreConfig
from clipfilter_wds.offline.rescoring.method import Method, OnPreparing, Preparing, Rescored, drop, reasons_of
from clipfilter_wds.offline.rescoring.sources import Sources, SourceShard
from clipfilter_wds.scores.kind import ScoreKind
from clipfilter_wds.scores.rescore.combine import Ranks, find_stages, min_rank, passes_stages, product, weighted_sum
from clipfilter_wds.types import DropReason


def combination(config: RescoreConfig, sources: Sources, on_preparing: OnPreparing) -> Method:
    """Prepare the method of a combination."""
    if config.method == "then":
        return _then(config, sources, on_preparing)
    if config.method == "min_rank":
        return _min_rank(config, sources, on_preparing)

    def score(shard: SourceShard) -> Rescored:
        each = shard.usable_scores
        scores = product(each) if config.method == "product" else weighted_sum(each, config.folder_weights)
        return Rescored(scores=scores, reasons=reasons_of(shard))

    return Method(score=score, settings=config.settings, kind=ScoreKind(config.method, None, None))


def _min_rank(config: RescoreConfig, sources: Sources, on_preparing: OnPreparing) -> Method:
    columns: list[list[np.ndarray]] = [[] for _ in config.folders]
    for shard in sources.shards:
        for column, scores in zip(columns, shard.usable_scores, strict=True):
            column.append(scores)
        on_preparing(Preparing("reading scores", shard.number + 1, len(sources), "shards"))
    ranks = [Ranks(column) for column in columns]

    def score(shard: SourceShard) -> Rescored:
        return Rescored(scores=min_rank(shard.usable_scores, ranks), reasons=reasons_of(shard))

    settings = {**config.settings, "tables": sources.digest()}
    return Method(score=score, settings=settings, kind=ScoreKind("min_rank", 0.0, 1.0))


def _then(config: RescoreConfig, sources: Sources, on_preparing: OnPreparing) -> Method:
    def read() -> Iterator[list[np.ndarray]]:
        for shard in sources.shards:
            yield shard.usable_scores
            on_preparing(Preparing("reading scores", shard.number + 1, len(sources), "shards"))

    cutoffs = find_stages(read, config.folder_fractions)

    def score(shard: SourceShard) -> Rescored:
        kept = passes_stages(shard.usable_scores, cutoffs[shard.number])
        return drop(shard, ~kept, DropReason.NOT_SELECTED)

    return Method(score=score, settings={**config.settings, "tables": sources.digest()})
