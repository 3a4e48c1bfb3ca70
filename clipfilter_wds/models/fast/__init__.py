"""Runs the towers of a CLIP faster, above all on CPUs."""
