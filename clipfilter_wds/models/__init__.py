"""Turns pixels and tokens into cosine similarities, with a dual encoder of any library."""
