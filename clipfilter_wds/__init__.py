"""Filters image-caption shards by CLIP similarity: inline while training, or ahead of it."""

from typing import TYPE_CHECKING, Any

from clipfilter_wds.version import __version__ as __version__

if TYPE_CHECKING:
    from clipfilter_wds.models.config import ScorerConfig
    from clipfilter_wds.models.scorer import ClipScorer
    from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
    from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig
    from clipfilter_wds.offline.rescoring.run import rescore_shards
    from clipfilter_wds.offline.run import process_shards
    from clipfilter_wds.scores.folder import ScoreFolder
    from clipfilter_wds.tables.operator import ImageClipFilter
    from clipfilter_wds.training.config import LoaderConfig
    from clipfilter_wds.training.datamodule import ClipFilterDataModule
    from clipfilter_wds.training.dataset import ClipWebDataset
    from clipfilter_wds.training.loader import ClipFilterLoader
    from clipfilter_wds.training.monitor import ClipFilterMonitor
    from clipfilter_wds.training.pipeline import clip_filter
    from clipfilter_wds.types import DropReason, FilterStats

_HOME = {
    "ClipFilterDataModule": "training.datamodule",
    "ClipFilterLoader": "training.loader",
    "ClipFilterMonitor": "training.monitor",
    "ClipScorer": "models.scorer",
    "ClipWebDataset": "training.dataset",
    "DedupConfig": "offline.rescoring.config",
    "DropReason": "types",
    "FilterStats": "types",
    "ImageClipFilter": "tables.operator",
    "LoaderConfig": "training.config",
    "RescoreConfig": "offline.rescoring.config",
    "RewriteConfig": "offline.config",
    "ScoreConfig": "offline.config",
    "ScoreFolder": "scores.folder",
    "ScorerConfig": "models.config",
    "clip_filter": "training.pipeline",
    "process_shards": "offline.run",
    "rescore_shards": "offline.rescoring.run",
}

__all__ = [
    "ClipFilterDataModule",
    "ClipFilterLoader",
    "ClipFilterMonitor",
    "ClipScorer",
    "ClipWebDataset",
    "DedupConfig",
    "DropReason",
    "FilterStats",
    "ImageClipFilter",
    "LoaderConfig",
    "RescoreConfig",
    "RewriteConfig",
    "ScoreConfig",
    "ScoreFolder",
    "ScorerConfig",
    "clip_filter",
    "process_shards",
    "rescore_shards",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import clipfilter_wds`` doesn't import torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
