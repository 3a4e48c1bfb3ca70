"""Scores the pairs that the rows of a table name, and keeps the rows whose caption describes the image."""
