"""Writes rows of other tables as parquet, with a type for each column."""

import functools
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter_wds.tables.formats.rows import Record

_GROUP_ROWS = 1 << 16

#: Whole numbers that float64 can't hold exactly, until all are known.
_LARGE = pa.uint64()

#: The type of columns whose values have no one type: text as it is, all else as JSON.
_MIXED = pa.large_string()


def write_records(file: BinaryIO, columns: list[str], read: Callable[[], Iterator[Record]]) -> None:
    """Write records as a parquet table.

    A column of booleans, numbers, text, or lists of one of these has that type; one of objects or of several types is
    text: strings as they are, all else as JSON.

    Args:
        file: Where to write.
        columns: All columns there are, in order.
        read: Yields the records, as often as it is called.
    """
    types: dict[str, pa.DataType] = dict.fromkeys(columns, pa.null())
    for record in read():
        for column, value in record.items():
            types[column] = _merged(types[column], _type_of(value))
    schema = pa.schema([(column, _final(found)) for column, found in types.items()])
    records = read()
    with pq.ParquetWriter(file, schema) as writer:
        while run := list(islice(records, _GROUP_ROWS)):
            arrays = [
                pa.array([_as(found, record.get(column)) for record in run], schema.field(column).type)
                for column, found in types.items()
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _type_of(value: object) -> pa.DataType:
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            return _MIXED
        return pa.int64() if abs(value) <= 1 << 53 else _LARGE
    if isinstance(value, list):
        inner = functools.reduce(_merged, map(_type_of, value), pa.null())
        return _MIXED if inner == _MIXED else pa.list_(inner)
    return {type(None): pa.null(), float: pa.float64(), str: pa.string()}.get(type(value), _MIXED)


def _merged(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _merged(one.value_type, other.value_type)
        return _MIXED if inner == _MIXED else pa.list_(inner)
    if {one, other} == {pa.int64(), _LARGE}:
        return _LARGE
    return pa.float64() if {one, other} == {pa.int64(), pa.float64()} else _MIXED


def _final(found: pa.DataType) -> pa.DataType:
    if pa.types.is_list(found):
        return pa.list_(_final(found.value_type))
    return {_MIXED: pa.string(), _LARGE: pa.int64()}.get(found, found)


def _as(found: pa.DataType, value: object) -> object:
    if found != _MIXED or value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
