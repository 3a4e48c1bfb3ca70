"""Filter image-caption shards by CLIP similarity: inline while training, or ahead of it."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clipfilter_wds.datamodule import ClipFilterDataModule, ClipFilterMonitor
    from clipfilter_wds.dataset import ClipWebDataset
    from clipfilter_wds.loader import ClipFilterLoader
    from clipfilter_wds.operator import ImageClipFilter
    from clipfilter_wds.rewrite import RewriteConfig, ScoreConfig, process_shards
    from clipfilter_wds.scorer import ClipScorer
    from clipfilter_wds.scores import ScoreTable
    from clipfilter_wds.types import DropReason, FilterStats

_HOME = {
    "ClipFilterDataModule": "datamodule",
    "ClipFilterLoader": "loader",
    "ClipFilterMonitor": "datamodule",
    "ClipScorer": "scorer",
    "ClipWebDataset": "dataset",
    "DropReason": "types",
    "FilterStats": "types",
    "ImageClipFilter": "operator",
    "RewriteConfig": "rewrite",
    "ScoreConfig": "rewrite",
    "ScoreTable": "scores",
    "process_shards": "rewrite",
}

__all__ = [
    "ClipFilterDataModule",
    "ClipFilterLoader",
    "ClipFilterMonitor",
    "ClipScorer",
    "ClipWebDataset",
    "DropReason",
    "FilterStats",
    "ImageClipFilter",
    "RewriteConfig",
    "ScoreConfig",
    "ScoreTable",
    "process_shards",
]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `import clipfilter_wds` costs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
