"""Reads tables of several file formats, and writes kept rows byte for byte."""
