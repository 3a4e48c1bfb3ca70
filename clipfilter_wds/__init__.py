"""Filter image-caption shards by CLIP similarity: inline while training, or ahead of it."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clipfilter_wds.dataset import ClipWebDataset
    from clipfilter_wds.rewrite import RewriteConfig, ScoreConfig, process_shards
    from clipfilter_wds.scorer import ClipScorer
    from clipfilter_wds.scores import ShardScores
    from clipfilter_wds.types import DropReason, FilterStats
    from clipfilter_wds.world import World

_HOME = {
    "ClipScorer": "scorer",
    "ClipWebDataset": "dataset",
    "DropReason": "types",
    "FilterStats": "types",
    "RewriteConfig": "rewrite",
    "ScoreConfig": "rewrite",
    "ShardScores": "scores",
    "World": "world",
    "process_shards": "rewrite",
}

__all__ = [
    "ClipScorer",
    "ClipWebDataset",
    "DropReason",
    "FilterStats",
    "RewriteConfig",
    "ScoreConfig",
    "ShardScores",
    "World",
    "process_shards",
]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `import clipfilter_wds` costs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
