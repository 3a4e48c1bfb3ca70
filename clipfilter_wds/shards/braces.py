"""Expands brace ranges: ``{00000..00999}.tar`` and ``{a,b}.tar``."""

import re

from braceexpand import braceexpand

from clipfilter_wds.shards.names import is_pipe
from clipfilter_wds.storage.errors import without_secrets

#: A range of numbers in braces. All its names are held in memory; the largest collections have some hundred thousand.
_NUMBERS = re.compile(r"\{(-?\d+)\.\.(-?\d+)[}.]")
_MAX_NUMBERS = 10_000_000


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for; itself where it has no braces.

    Raises:
        ValueError: When its braces are none of these, or stand for too many names, or for shell commands.
    """
    if not {"{", "}"} & set(pattern):
        return [pattern]
    for first, last in _NUMBERS.findall(pattern):
        if (num := abs(int(last) - int(first)) + 1) > _MAX_NUMBERS:
            raise ValueError(f"{without_secrets(pattern)!r} stands for {num:,} shards; is {last} what was meant?")
    try:
        # A backslash is a character like any other.
        expanded = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise ValueError(f"{without_secrets(pattern)!r} is not a brace range like {{00000..00999}}: {error}") from None
    if expanded != [pattern] and any(map(is_pipe, expanded)):
        raise ValueError(f"no shard matches {pattern!r}: a shell command can't stand in braces")
    return expanded
