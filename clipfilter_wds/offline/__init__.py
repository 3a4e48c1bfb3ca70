"""Scores shards ahead of training, and writes what is kept of them."""
