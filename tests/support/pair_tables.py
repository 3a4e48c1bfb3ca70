"""Reads tables of pairs back, whatever their type."""

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq

NUM_ROWS = 100
SUFFIXES = ("jsonl", "csv", "parquet", "json")


def read_records(path: Path) -> list[dict[str, object]]:
    """The rows of a table file of any type."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text()
    if path.suffix in (".csv", ".tsv"):
        return list(csv.DictReader(io.StringIO(text), delimiter="," if path.suffix == ".csv" else "\t"))
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
