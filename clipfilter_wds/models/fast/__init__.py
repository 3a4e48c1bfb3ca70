"""Runs CLIP's towers faster on CPUs."""
