"""Derives names from shard URLs: output names, public URLs, folders."""

import posixpath
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.paths import folder_identity
from clipfilter_wds.storage.url import parse_url, real_path

_TAR_SUFFIX = re.compile(r"\.(tar|tgz|tzst|tar\.(gz|zst|zstd))$", re.IGNORECASE)
_PIPE = "pipe:"
#: What a file name may have, less what is put behind a shard's name.
_MAX_NAME_BYTES = 255 - len("_stats.json.failed")


def identity(url: str) -> str:
    """A text that is the same for all ways to write one file: a path of this machine, or a URL without caches."""
    if is_pipe(url):
        return url
    parsed = parse_url(url)
    path = parsed.local_path
    return parsed.source if path is None else real_path(path)


def is_pipe(url: str) -> bool:
    """Whether a shell command writes the shard."""
    return url.startswith(_PIPE)


def has_tar_suffix(url: str) -> bool:
    """Whether a file is named as shards are."""
    return _TAR_SUFFIX.search(_place_of(url)) is not None


def shard_name(url: str) -> str:
    """The shard's base name without folder, query and tar suffix: ``s3://b/x/00000.tar.gz?v=1`` is ``00000``.

    Bytes of a path that are not UTF-8 are escaped, so that the name can stand anywhere.

    Raises:
        ValueError: When no output file could have it.
    """
    name = _TAR_SUFFIX.sub("", posixpath.basename(_place_of(url)))
    if url.endswith("/") and parse_url(url).local_path is None:
        raise ValueError(f"{without_secrets(url)!r} is a folder; name its shards: {without_secrets(url)}*.tar")
    if name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{without_secrets(url)!r} has no base name that an output file could have")
    if (num_bytes := len(name.encode())) > _MAX_NAME_BYTES:
        raise ValueError(
            f"{without_secrets(url)!r} has a name of {num_bytes} bytes, and outputs are named after it; "
            f"give it one of {_MAX_NAME_BYTES} at most"
        )
    return name


def unnameable(urls: Iterable[str]) -> dict[str, str]:
    """The shards after which no output can be named, and why."""
    found = {}
    for url in urls:
        try:
            shard_name(url)
        except ValueError as error:
            found[url] = str(error)
    return found


def shard_path(url: str) -> str:
    """The absolute path of a shard without tar suffix: ``s3://b/x/00000.tar.gz?v=1`` is ``/b/x/00000``."""
    return posixpath.join(_folder_of(url), shard_name(url))


def output_names(urls: Sequence[str]) -> dict[str, str]:
    """A relative output name without suffix for each URL, no two alike.

    These are base names where all differ; where some are alike, every shard keeps its folders below the common parent.

    Raises:
        ValueError: When two shards would still get one name (``00000.tar`` beside ``00000.tar.gz``).
    """
    names = {url: shard_name(url) for url in urls}
    if len(set(names.values())) < len(urls):
        folders = {url: _folder_of(url) for url in urls}
        common = posixpath.commonpath(list(folders.values())) if urls else ""
        names = {url: posixpath.join(posixpath.relpath(folders[url], common), names[url]) for url in urls}
        names = {url: posixpath.normpath(name) for url, name in names.items()}
    taken: dict[str, str] = {}
    for url, name in names.items():
        if name in taken:
            raise ValueError(
                f"{without_secrets(taken[name])!r} and {without_secrets(url)!r} would both be written to "
                f"{name + '.tar'!r}; rename one of them"
            )
        taken[name] = url
    return names


def public_url(url: str) -> str:
    """The absolute URL of a shard without user, password and query, which may be secret; the path of a local one.

    Bytes of a path that are not UTF-8 are escaped.
    """
    if is_pipe(url):
        return f"{url.split()[0]} …" if " " in url else url  # a command's arguments may hold secrets
    return _text(parse_url(url).public)


def shard_folder(url: str) -> str:
    """The folder that holds a shard, written as ``folder_identity`` does."""
    path = None if is_pipe(url) else parse_url(url).local_path
    return posixpath.dirname(public_url(url)) if path is None else folder_identity(path.parent)


def _place_of(url: str) -> str:
    if not is_pipe(url):
        return _text(parse_url(url).place)
    parts = urlsplit(url)
    return parts.path if "://" in url else url


def _folder_of(url: str) -> str:
    path = None if is_pipe(url) else parse_url(url).local_path
    folder = posixpath.dirname(_place_of(url)) if path is None else _text(real_path(path.parent))
    return posixpath.normpath("/" + folder.lstrip("/"))


def _text(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()
