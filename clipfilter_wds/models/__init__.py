"""Turns pixels and tokens into embeddings and cosine similarities, with a CLIP of any library."""
