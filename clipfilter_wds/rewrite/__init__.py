"""Offline: score shards, select, write, commit."""

from clipfilter_wds.rewrite.config import RewriteConfig, ScoreConfig
from clipfilter_wds.rewrite.run import process_shards
from clipfilter_wds.rewrite.tally import Tally

__all__ = ["RewriteConfig", "ScoreConfig", "Tally", "process_shards"]
