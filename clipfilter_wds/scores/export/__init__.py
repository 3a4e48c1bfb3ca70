"""Writes scores and embeddings as other tools keep theirs."""
