"""Offline: score shards, select, write, commit."""

from clipfilter_wds.rewrite.config import RewriteConfig, ScoreConfig
from clipfilter_wds.rewrite.run import Tally, process_shards

__all__ = ["RewriteConfig", "ScoreConfig", "Tally", "process_shards"]
