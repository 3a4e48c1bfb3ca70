"""Runs the processes that read and decode samples."""
