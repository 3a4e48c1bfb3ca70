"""Reads samples from tar shards, and writes members to new ones."""
