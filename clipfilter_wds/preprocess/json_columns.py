"""Reads fields of a sample's json member that become columns of its score table."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clipfilter_wds.preprocess.json_member import encodable, json_member, json_values
from clipfilter_wds.types import Sample

#: What a column may hold, as the option calls it; the first is the default.
COLUMN_TYPES = ("number", "integer", "text", "bool")

#: How fields of other types than a column's are called.
_TYPE_NAMES = {float: "number", int: "integer", str: "text", bool: "bool", list: "list"}

JsonValue = float | int | str | bool | None


@dataclass(frozen=True)
class JsonColumns:
    """Fields of the json member, each of a type, under their own names.

    Attributes:
        text: ``json:punsafe,json:LANGUAGE=text``: fields, with dots for those within others, and their types.

    Raises:
        ValueError: When it names none, one twice, or a type that is none.
    """

    text: str

    def __post_init__(self) -> None:
        names = [name for name, _ in self.fields]
        if len(set(names)) < len(names):
            raise ValueError(f"columns {self.text!r} names a field twice")

    @cached_property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """Name and type of each."""
        found = []
        for part in self.text.split(","):
            field, _, kind = part.strip().partition("=")
            source, _, name = field.partition(":")
            kind = kind or COLUMN_TYPES[0]
            is_one = "json:" not in name  # "json:a json:b", without a comma, is none
            if source != "json" or not all(name.split(".")) or not is_one or kind not in COLUMN_TYPES:
                raise ValueError(
                    f"columns {self.text!r}: {part.strip()!r} should be json:FIELD or json:FIELD=TYPE, with a TYPE of "
                    f"{', '.join(COLUMN_TYPES)}"
                )
            found.append((name, kind))
        return tuple(found)

    @property
    def sources(self) -> tuple[str, ...]:
        """Each field with its type, as score tables name them."""
        return tuple(f"json:{name}={kind}" for name, kind in self.fields)

    def read(self, sample: Sample) -> tuple[JsonValue, ...]:
        """The values of a sample; None for one that is missing, or of another type."""
        text = json_member(sample)
        try:
            record = {} if text is None else json.loads(text)
        except (ValueError, RecursionError):
            record = {}
        return tuple(_value(record, name, kind) for name, kind in self.fields)


def column_name(source: str) -> str:
    """What a column is called that score tables name ``json:punsafe=number``."""
    return source.removeprefix("json:").rpartition("=")[0]


def fields_of(text: str, depth: int = 3) -> dict[str, str]:
    """The fields of a JSON object and their types: those of columns, or ``list``, ``null``; dots for nested ones."""
    try:
        return dict(_fields_of(json.loads(text), depth))
    except (ValueError, RecursionError):
        return {}


def _fields_of(record: Any, depth: int) -> Iterator[tuple[str, str]]:
    for name, value in record.items() if isinstance(record, dict) and depth else ():
        if isinstance(value, dict):
            yield from ((f"{name}.{below}", kind) for below, kind in _fields_of(value, depth - 1))
        else:
            yield encodable(name), _TYPE_NAMES.get(type(value), "null")


def _value(record: Any, name: str, kind: str) -> JsonValue:
    values = list(json_values(record, name))
    value: Any = values[0] if len(values) == 1 else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "number" and is_number:
        return _finite(value)
    if kind == "integer" and is_number and abs(value) < 1 << 63 and value == int(value):
        return int(value)
    if (kind == "text" and isinstance(value, str)) or (kind == "bool" and isinstance(value, bool)):
        return encodable(value) if isinstance(value, str) else value
    return None


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except OverflowError:  # JSON's whole numbers have no limit
        return None
    return number if math.isfinite(number) else None
