"""Demonstrates the package without downloads: drawn scenes with captions, and a tiny CLIP trained on them."""
