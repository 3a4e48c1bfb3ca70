"""Reads and writes files on this machine and on any storage that fsspec knows."""
