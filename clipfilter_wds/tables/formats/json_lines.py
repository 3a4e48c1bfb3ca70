"""Reads JSON lines, passing over lines that hold no object, and writes objects as lines."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

_MAX_LINE_BYTES = 1 << 28
_MAX_REMEMBERED = 5
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32's other one begins as the first

Record = dict[str, Any]


@dataclass
class BadLines:
    """Counts the lines of a table that hold no row, and remembers what is wrong with the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    _num_named: int = 0

    def add(self, where: str, why: object, num_lines: int = 1) -> None:
        """Count a line, or several that belong together; ``where`` names them (``line 17``)."""
        self.count += num_lines
        if len(self.first) < _MAX_REMEMBERED:
            self.first.append(f"{where}: {why}")
            self._num_named += num_lines

    def __str__(self) -> str:
        more = f"; and {self.count - self._num_named:,} more" if self.count > self._num_named else ""
        return "; ".join(self.first) + more


def read_json_lines(file: BinaryIO, bad: BadLines) -> Iterator[tuple[bytes, Record]]:
    """Yield each line that is a JSON object: its bytes without the line end, and the object. Blank lines are skipped.

    Args:
        file: The open file.
        bad: Counts the lines that are no JSON objects.

    Raises:
        ValueError: When the file is in UTF-16 or UTF-32, or a line is so long that it can't be JSON lines.
    """
    number = 0
    while line := file.readline(_MAX_LINE_BYTES):
        number += 1
        if number == 1 and _is_wide(line[:4]):
            raise ValueError("it is in UTF-16 or UTF-32; save it as UTF-8")
        if len(line) == _MAX_LINE_BYTES:
            raise ValueError(
                f"line {number} is longer than {_MAX_LINE_BYTES:,} bytes; is this a JSON array? Name it .json"
            )
        line = (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).strip()
        if not line:
            continue
        try:
            yield line, _parse(line)
        except (ValueError, RecursionError) as error:
            bad.add(f"line {number}", error)


def _is_wide(start: bytes) -> bool:
    """Whether JSON that begins with these bytes has several for each character."""
    return start.startswith(_WIDE_MARKS) or (b"\0" in start and b"{" in start)


def _parse(line: bytes) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__}, not an object")
    return record


def load_json(text: bytes) -> Any:
    """Parse a file of JSON.

    Raises:
        ValueError: When it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def dump_record(record: Record, **options: Any) -> bytes:
    """A record as a line of JSON without the line end; ``options`` are those of ``json.dumps``."""
    try:
        return json.dumps(record, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 can't hold but an escape can
        return json.dumps(record, **options).encode()
