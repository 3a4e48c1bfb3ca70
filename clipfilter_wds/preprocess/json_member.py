"""Reads fields of a sample's json member. Imports nothing heavy."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.storage.text import decode_text
from clipfilter_wds.types import Sample

_MAX_JSON_BYTES = SampleLayout().max_text_bytes


def json_member(sample: Sample) -> str | None:
    """The text of a sample's json member; None where there is none, or it is large."""
    data = next((member.data for member in sample.members if member.extension == "json"), None)
    return None if data is None or len(data) > _MAX_JSON_BYTES else decode_text(data, errors="replace")


def json_values(record: Any, field: str) -> Iterator[Any]:
    """What a field holds; of a list, each entry. Names after dots are those of fields in the one before."""
    return _values_of(record, field.split("."))


def json_texts(record: Any, field: str) -> list[str]:
    """What a field of a JSON object holds: a text, or the texts of a list."""
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError):
            return []
    return [encodable(text) for text in json_values(record, field) if isinstance(text, str)]


def encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-8", errors="replace").decode()


def _values_of(value: Any, names: Sequence[str]) -> Iterator[Any]:
    """What a field holds, or of a list each entry; names after the first are those of fields in the one before.

    A field whose own name has the dots comes before one in another.
    """
    if isinstance(value, list):
        for entry in value:
            if not isinstance(entry, list):
                yield from _values_of(entry, names)
    elif not names:
        yield value
    elif isinstance(value, dict):
        for end in range(len(names), 0, -1):
            if (name := ".".join(names[:end])) in value:
                yield from _values_of(value[name], names[end:])
                return
