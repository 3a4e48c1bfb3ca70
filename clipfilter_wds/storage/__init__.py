"""Reads and writes files of this machine and of any fsspec storage."""
