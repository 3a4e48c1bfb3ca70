"""Derives better scores from saved embeddings and from other scores. No model is needed."""
