"""Counts what the members of a shard are called, to say so where samples lack an image or a caption."""

import json
from collections.abc import Iterator
from typing import Any

from clipfilter_wds.storage.text import decode_text

#: What begins the name of a link's extension.
LINK = "link:"

_MAX_NAMES = 32
_MAX_NAME_CHARS = 60
#: A json member whose fields are named is no larger, and a field of it lies no deeper.
_MAX_JSON_BYTES = 1 << 16
_MAX_DEPTH = 3


class FoundMembers:
    """How often each extension came by in a shard, in the order in which they did.

    A name without one counts as "". Links are counted too, as ``link:jpg``, and of the first json member the fields
    that hold text, as ``json:caption``. However many there are and however long, only the first few names are kept, by
    their beginnings.
    """

    def __init__(self) -> None:
        #: Name -> how many.
        self.counts: dict[str, int] = {}

    def add(self, name: str) -> None:
        """Count a member."""
        if name not in self.counts:
            name = name[:_MAX_NAME_CHARS]
            if name not in self.counts and len(self.counts) >= _MAX_NAMES:
                return
            self.counts.setdefault(name, 0)
        self.counts[name] += 1

    def add_fields(self, extension: str, data: bytes) -> None:
        """Note what fields a json member with this extension has."""
        if len(data) <= _MAX_JSON_BYTES:
            for field in _text_fields(data):
                self.add(f"{extension}:{field}")


def _text_fields(data: bytes) -> Iterator[str]:
    """The fields of a JSON object that hold text or a list, with dots where they are nested."""
    try:
        record = json.loads(decode_text(data, errors="replace"))
    except (ValueError, RecursionError):
        return
    yield from _fields_of(record, _MAX_DEPTH)


def _fields_of(record: Any, depth: int) -> Iterator[str]:
    for name, value in record.items() if isinstance(record, dict) and depth else ():
        if isinstance(value, (str, list)):
            yield name
        for below in _fields_of(value, depth - 1):
            yield f"{name}.{below}"
