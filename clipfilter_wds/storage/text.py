"""Decodes text that users wrote: captions, and files that list shards or keys."""

import codecs
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

#: Byte-order marks with the encodings that they stand for. UTF-32's comes first, since it begins as UTF-16's does.
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def decode_text(data: bytes, *, errors: str = "strict") -> str:
    """Decode text in UTF-8, or in what its byte-order mark says; ``errors`` as in ``bytes.decode``."""
    return data.decode(_encoding_of(data), errors)


def read_lines(path: Path, what: str, *, hint: str = "save it as UTF-8", errors: str = "strict") -> Iterator[str]:
    """The lines of a text file that are not blank, without the white space behind them.

    Args:
        path: UTF-8, or UTF-16 or UTF-32 with a byte-order mark; lines end in any way. ``~`` is the home folder.
        what: What messages call the file.
        hint: What to do about a file in another encoding.
        errors: As in ``bytes.decode``.

    Raises:
        ValueError: When the file can't be read or decoded; it names the file.
    """
    path = path.expanduser()
    try:
        # Opened once: what a shell's <(command) stands for can be read only once.
        with path.open("rb") as file, TextIOWrapper(file, _encoding_of(file.peek(4)), errors) as lines:
            yield from filter(None, map(str.rstrip, lines))
    except UnicodeError as error:
        raise ValueError(f"{what} {str(path)!r} is no text: {error}; {hint}") from None
    except OSError as error:
        raise ValueError(f"can't read {what} {str(path)!r}: {error.strerror}") from None


def _encoding_of(start: bytes) -> str:
    return next((encoding for mark, encoding in _ENCODINGS.items() if start.startswith(mark)), "utf-8")
