"""Filters while training runs: batches of constant size, resumable, on any number of ranks."""
