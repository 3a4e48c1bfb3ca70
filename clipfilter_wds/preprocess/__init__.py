"""Prepares samples for a model: pixels and tokens."""
