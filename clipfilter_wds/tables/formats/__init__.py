"""Reads and writes the file formats of tables, byte for byte."""
