"""Turns shard patterns into samples, and samples into tars."""
