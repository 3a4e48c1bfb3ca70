"""Expands what the user wrote into a list of shard URLs."""

from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from clipfilter_wds.shards.names import identity
from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.filesystem import local_path
from clipfilter_wds.storage.open import is_glob, list_matches
from clipfilter_wds.storage.text import read_lines


def expand_shards(shards: str | Path | Sequence[str | Path], *, allow_pipe: bool = False) -> list[str]:
    """The URL of every shard that ``shards`` names, each once, in the order given (the matches of a glob sorted).

    Args:
        shards: A path or URL, a glob, a brace range (``{00000..00999}``), several of these separated by commas,
            ``@file.txt`` with one of these per line, or a list of any of these.
        allow_pipe: Accept ``pipe:`` URLs. They run a shell command, so only ever for input that you trust.

    Raises:
        ValueError: When nothing matches, a folder is named, or a ``pipe:`` URL is not allowed.
    """
    patterns = [shards] if isinstance(shards, (str, Path)) else list(shards)
    if not patterns:
        raise ValueError("no shard matches an empty list")
    urls: dict[str, str] = {}
    for pattern in map(str, patterns):
        found = _expand_one(pattern, allow_pipe)
        if not found:
            raise ValueError(f"no shard matches {without_secrets(pattern)!r}")
        urls.update({identity(url): url for url in found if identity(url) not in urls})
    return list(urls.values())


def _expand_one(pattern: str, allow_pipe: bool) -> list[str]:
    if pattern.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(f"{pattern!r} would run a shell command; pass allow_pipe=True if you trust it")
        return [pattern]
    if "://" not in pattern and Path(pattern).is_file():
        return [pattern]  # where a file has that very name, a comma or bracket in it means nothing else
    if pattern.startswith("@"):
        return [url for line in _lines(Path(pattern[1:])) for url in _expand_one(line, allow_pipe)]
    parts = [part.strip() for part in _split_at_commas(pattern)]
    if len(parts) > 1:
        return [url for part in parts if part for url in _expand_one(part, allow_pipe)]
    try:
        candidates = list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"{without_secrets(pattern)!r} is not a brace range like {{00000..00999}}: {error}") from None
    return [url for candidate in candidates for url in _matches(candidate)]


def _split_at_commas(pattern: str) -> list[str]:
    """Split at commas, but not at those in braces."""
    parts, depth = [""], 0
    for char in pattern:
        depth += (char == "{") - (char == "}")
        if char == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _lines(path: Path) -> list[str]:
    lines = map(str.strip, read_lines(path, "the list of shards"))
    return [line for line in lines if not line.startswith("#")]


def _matches(url: str) -> list[str]:
    if is_glob(url):
        found = list_matches(url)
        if not found:
            raise ValueError(f"no shard matches {without_secrets(url)!r}")
        return found
    path = local_path(url)
    if path is not None and path.is_dir():
        raise ValueError(f"{url!r} is a folder; name its shards, for example {url.rstrip('/') + '/*.tar'!r}")
    if path is not None and not path.exists():
        raise ValueError(f"no shard matches {url!r}: there is no such file")
    return [url]
