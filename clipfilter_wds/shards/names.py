"""Derives names from shard URLs: output names, public URLs, folders."""

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.filesystem import local_path
from clipfilter_wds.storage.paths import folder_identity

_TAR_SUFFIX = re.compile(r"\.(tar|tgz|tzst|tar\.(gz|zst|zstd))$", re.IGNORECASE)


def identity(url: str) -> str:
    """A text that is the same for all ways to write one local path."""
    return url if "://" in url or url.startswith("pipe:") else str(Path(url).expanduser().resolve())


def shard_name(url: str) -> str:
    """The shard's base name without folder, query and tar suffix: ``s3://b/x/00000.tar.gz?v=1`` is ``00000``."""
    base = posixpath.basename(_path_of(url))
    name = _TAR_SUFFIX.sub("", base)
    if name in ("", ".", "..") or "\0" in name or "\\" in name:
        raise ValueError(f"{without_secrets(url)!r} has no base name that an output file could have")
    return name


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
    """The absolute URL of a shard without user, password and query, which may be secret."""
    if url.startswith("pipe:"):
        return f"{url.split()[0]} …" if " " in url else url  # a command's arguments may hold secrets
    if "://" not in url:
        return identity(url)
    parts = urlsplit(url.rpartition("::")[2])
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path if parts.scheme and "://" in url else url


def _folder_of(url: str) -> str:
    folder = posixpath.dirname(_path_of(url))
    absolute = folder if "://" in url else str(Path(folder).resolve())
    return posixpath.normpath("/" + absolute.lstrip("/"))


def shard_folder(url: str) -> str:
    """The folder that holds a shard, written as ``folder_identity`` does."""
    path = local_path(url)
    return posixpath.dirname(public_url(url)) if path is None else folder_identity(path.parent)
