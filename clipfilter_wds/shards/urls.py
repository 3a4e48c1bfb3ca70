"""Expands what the user wrote into a list of shard URLs."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from clipfilter_wds.console import printable
from clipfilter_wds.shards.braces import expand_braces
from clipfilter_wds.shards.names import has_tar_suffix, identity, is_pipe
from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.filesystem import filesystem
from clipfilter_wds.storage.open import exists, is_glob, list_matches
from clipfilter_wds.storage.text import read_lines
from clipfilter_wds.storage.url import ParsedUrl, is_there, parse_url

#: What stands before ``::`` and is no source of its own, but says how to read the one behind it.
_CHAIN = re.compile(r"[A-Za-z][\w+-]*")
_NUM_REQUESTS = 32
#: Shards that are missing, of which a warning gives the names.
_MAX_NAMED = 10

_log = logging.getLogger(__name__)


class MissingShardError(ValueError):
    """A shard is named and not there."""


@dataclass(frozen=True, kw_only=True)
class FoundShards:
    """What the user's patterns stand for.

    Attributes:
        urls: The shards, each once, in the order given.
        missing: Those that are named and not there, where that is no error.

    Raises:
        ValueError: When all are missing.
    """

    urls: list[str]
    missing: list[str]

    def __post_init__(self) -> None:
        if not self.urls:
            num, example = len(self.missing), without_secrets(self.missing[0])
            which = f": none of {num} is there, such as {example!r}" if num > 1 else f" {example!r}: it is not there"
            raise ValueError(f"no shard matches{which}")


def expand_shards(
    shards: str | Path | Sequence[str | Path], *, allow_pipe: bool = False, skip_missing: bool = False
) -> list[str]:
    """The URL of every shard that ``shards`` names, each once, in the order given (the matches of a glob sorted).

    Args:
        shards: A path or URL, a folder of this machine that holds shards, a glob, a brace range (``{00000..00999}``),
            several of these separated by commas or ``::``, ``@file.txt`` with one of these per line, or a list of any
            of these. Text is taken as it stands where a file has that very name. ``simplecache::`` belongs to the URL
            behind it.
        allow_pipe: Accept ``pipe:`` URLs. They run a shell command, so only ever for input that you trust.
        skip_missing: Leave out shards that are named and not there, such as those that a brace range spans, with a
            warning; else they are an error, or where only opening tells, as on remote storage, one of the shard's.

    Raises:
        ValueError: When nothing matches, a folder holds no shard, or a ``pipe:`` URL is not allowed;
            ``MissingShardError`` when a shard is not there.
    """
    found = find_shards(shards, allow_pipe=allow_pipe, skip_missing=skip_missing)
    if skip_missing:
        found = ask_for_missing(found)
    if found.missing:
        names = [printable(without_secrets(url)) for url in found.missing]
        more = f" and {len(names) - _MAX_NAMED} others" if len(names) > _MAX_NAMED else ""
        _log.warning("left out, as they are not there: %s%s", ", ".join(names[:_MAX_NAMED]), more)
    return found.urls


def find_shards(
    shards: str | Path | Sequence[str | Path], *, allow_pipe: bool = False, skip_missing: bool = False
) -> FoundShards:
    """The same as :func:`expand_shards`, and what is missing on this machine; no other is asked.

    Raises:
        ValueError: As :func:`expand_shards`; and when all shards are missing.
    """
    patterns = [shards] if isinstance(shards, (str, Path)) else list(shards)
    if not patterns:
        raise ValueError("no shard matches an empty list")
    expander = _Expander(allow_pipe=allow_pipe, skip_missing=skip_missing)
    urls: dict[str, str] = {}
    for pattern in map(str, patterns):
        num_missing = len(expander.missing)
        found = list(expander.expand(pattern))
        if not found and num_missing == len(expander.missing):
            raise ValueError(f"no shard matches {without_secrets(pattern)!r}")
        for url in found:
            urls.setdefault(identity(url), url)
    return FoundShards(urls=list(urls.values()), missing=list(dict.fromkeys(expander.missing)))


def ask_for_missing(found: FoundShards) -> FoundShards:
    """Ask remote storage too, once for each shard, which are there.

    Raises:
        ValueError: When all shards are missing.
    """
    with ThreadPoolExecutor(_NUM_REQUESTS, thread_name_prefix="clipfilter-storage") as pool:
        answers = list(zip(found.urls, pool.map(_may_be_there, found.urls), strict=True))
    missing = [url for url, there in answers if not there]
    return FoundShards(urls=[url for url, there in answers if there], missing=[*found.missing, *missing])


@dataclass(kw_only=True)
class _Expander:
    """Takes patterns apart, until only URLs and paths are left."""

    allow_pipe: bool
    skip_missing: bool
    missing: list[str] = field(default_factory=list)
    _lists: list[str] = field(default_factory=list)

    def expand(self, pattern: str) -> Iterator[str]:
        """The URLs that a pattern stands for, not each once."""
        if is_pipe(pattern):
            if not self.allow_pipe:
                raise ValueError(
                    f"{pattern!r} would run a shell command; pass allow_pipe=True if you trust it, which a dataset in "
                    "Python takes. The commands run none: have it write a file, and name that"
                )
            yield pattern
        elif _is_named(pattern):
            yield pattern  # where a file has that very name, no character in it means anything else
        elif (folder := _folder_named(pattern)) is not None:
            yield from _shards_in(pattern, folder)
        elif pattern.startswith("@") and _is_named(pattern[1:]):
            yield from self._expand_list(pattern)
        else:
            for take_apart in (_split_at_commas, _split_sources, expand_braces):
                if (parts := take_apart(pattern)) != [pattern]:
                    for part in parts:
                        yield from self.expand(part)
                    return
            yield from self._expand_list(pattern) if pattern.startswith("@") else self._find(pattern)

    def _expand_list(self, pattern: str) -> Iterator[str]:
        """What the lines of a file stand for."""
        if pattern in self._lists:
            raise ValueError(f"the list of shards {pattern[1:]!r} names itself")
        self._lists.append(pattern)
        for line in _lines(pattern[1:]):
            yield from self.expand(line)
        self._lists.remove(pattern)

    def _find(self, url: str) -> list[str]:
        """A URL, or the matches of a glob."""
        _check_can_be_read(url)
        if is_glob(url):
            found = list_matches(url)
            if not found:
                raise ValueError(f"no shard matches {without_secrets(url)!r}")
            return found
        if not url:
            raise ValueError("no shard matches an empty text")
        path = parse_url(url).local_path
        if path is None or is_there(path):  # a link that leads nowhere is there
            return _shards_in(url, path) if path is not None and _is_dir(path) and not has_tar_suffix(url) else [url]
        if self.skip_missing:
            self.missing.append(url)
            return []
        raise MissingShardError(f"no shard matches {url!r}: there is no such file")


def _shards_in(url: str, folder: Path) -> list[str]:
    """The files of a folder that are named as shards are, sorted."""
    try:
        names = sorted(path.name for path in folder.iterdir() if has_tar_suffix(path.name) and path.name[0] != ".")
    except OSError as error:
        raise ValueError(f"can't list {url!r}: {error.strerror}") from None
    if not names:
        raise ValueError(f"{url!r} is a folder that holds no shard; shards are named *.tar, or *.tar.gz, *.tar.zst")
    return [f"{url.rstrip('/') or ''}/{name}" for name in names]


def _is_named(path: str) -> bool:
    """Whether a path of this machine is one of a shard, or of what is named like one."""
    parsed = parse_url(path)
    if parsed.scheme is not None or parsed.local_path is None or not os.path.lexists(parsed.local_path):
        return False
    return has_tar_suffix(path) or not _is_dir(parsed.local_path)


def _folder_named(path: str) -> Path | None:
    """The folder of this machine that has this very name, if there is one; not one that is named like a shard."""
    parsed = parse_url(path)
    folder = parsed.local_path if path and parsed.scheme is None else None
    return folder if folder is not None and _is_dir(folder) and not has_tar_suffix(path) else None


def _is_dir(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path's own fails where it may not look


def _may_be_there(url: str) -> bool:
    return is_pipe(url) or parse_url(url).local_path is not None or exists(url)


def _check_can_be_read(url: str) -> None:
    """Check that a URL says how it is read, and that this can be done.

    Raises:
        ValueError: When it does not, or can't.
    """
    parsed = parse_url(url)
    if parsed.is_in_archive:
        raise ValueError(
            f"{without_secrets(url)!r} is a file within an archive; unpack that, and name the shard itself"
        )
    *chain, path = url.split("::")
    if parsed.scheme is None and chain and all(map(_CHAIN.fullmatch, chain)):
        parsed = ParsedUrl(caches="".join(f"{name}::" for name in chain), scheme="file", source=path)
    parsed.check()
    filesystem(url)  # raises where its package is missing


def _split_at_commas(pattern: str) -> list[str]:
    """Split at commas, but not at those in braces."""
    return _split(pattern, ",", "{", "}")


def _split_sources(pattern: str) -> list[str]:
    """Split at ``::``, as open_clip joins sources; a name such as ``simplecache`` stays with the source behind it.

    Raises:
        ValueError: When a part before ``::`` is a file within an archive, which would need the part behind it.
    """
    sources, chain = [], ""
    parts = _split(pattern, "::", "{[", "}]")
    for number, part in enumerate(parts, start=1):
        if number < len(parts) and _CHAIN.fullmatch(part):
            chain += f"{part}::"
            continue
        if number < len(parts) and parse_url(part).is_in_archive:
            _check_can_be_read(part)
        sources.append(chain + part)
        chain = ""
    return sources


def _split(pattern: str, separator: str, opening: str, closing: str) -> list[str]:
    """Split at a separator, but not within brackets nor in a shell command; blank parts are left out."""
    if separator not in pattern:
        return [pattern]
    parts, depth, start, at = [], 0, 0, 0
    while at < len(pattern):
        depth += (pattern[at] in opening) - (pattern[at] in closing)
        if depth <= 0 and pattern.startswith(separator, at) and not is_pipe(pattern[start:].lstrip()):
            parts.append(pattern[start:at])
            start = at = at + len(separator)
        else:
            at += 1
    parts.append(pattern[start:])
    return [pattern] if len(parts) == 1 else [part.strip() for part in parts if part.strip()]


def _lines(name: str) -> list[str]:
    path, what = parse_url(name).local_path, "the list of shards"
    if path is None:
        raise ValueError(f"{what} {without_secrets(name)!r} is not on this machine; copy it here")
    try:
        lines = [*map(str.strip, read_lines(path, what))]
    except ValueError:
        if not path.is_file():
            raise  # it is not there, or can't be read twice
        # The name of a file need not be text, and a list of such names is none either.
        lines = [*map(str.strip, read_lines(path, what, errors="surrogateescape"))]
        odd = [line for line in lines if line != line.encode(errors="ignore").decode()]
        if not (odd and all(map(_is_named, odd))):
            raise
    return [line for line in lines if not line.startswith("#")]
