"""Finds the fsspec file system of a URL."""

import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.registry import registry

from clipfilter_wds.storage.errors import without_secrets

_CACHE = "simplecache::"
_UNSAFE_CACHES = ("filecache::", "blockcache::", "cached::")
_EXTRA_OF_PROTOCOL = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def filesystem(url: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL or path, and the file's name in it; behind ``simplecache::``, those of the source.

    Call it again in a forked process: the parent's file system doesn't work there.

    Raises:
        ValueError: When its package is not installed, naming the pip command; when there is no such scheme; or as
            :func:`source_of` raises.
    """
    source = source_of(url)
    try:
        fs, path = fsspec.core.url_to_fs(source, **options)
    except ImportError as error:
        raise _missing_package(source, error) from None
    return fs, path


def check_installed(url: str) -> None:
    """Check that the package for a URL's scheme is installed, without connecting to anything.

    Raises:
        ValueError: When it is not, naming the pip command. An unknown scheme passes, and fails when it is opened.
    """
    source = source_of(url)
    try:
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(source))
    except ImportError as error:
        raise _missing_package(source, error) from None
    except ValueError:
        pass


def _missing_package(url: str, error: ImportError) -> ValueError:
    protocol = fsspec.utils.get_protocol(url)
    extra = _EXTRA_OF_PROTOCOL.get(protocol)
    cure = f"pip install 'clipfilter-wds[{extra}]'" if extra else str(error)
    return ValueError(f"{protocol}:// needs a package that is not installed: {cure}")


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether its files are on this machine."""
    return _answers_to(fs, "file")


def is_web(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether its files are on web servers, which can't be written to."""
    return _answers_to(fs, "http")


def _answers_to(fs: fsspec.AbstractFileSystem, scheme: str) -> bool:
    return scheme in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def local_path(url: str) -> Path | None:
    """The path of a URL's file on this machine, or None when it is elsewhere."""
    fs, path = filesystem(url)
    return Path(path) if is_local(fs) else None


# --- simplecache:: ---


def is_cached(url: str) -> bool:
    """Whether a copy of the file is to be kept on this machine."""
    return url.startswith(_CACHE)


def source_of(url: str) -> str:
    """The URL without ``simplecache::``.

    Raises:
        ValueError: When it names a cache that may deliver wrong bytes, or a file that is on this machine anyway.
    """
    if url.startswith(_UNSAFE_CACHES):
        raise ValueError(f"{without_secrets(url)!r}: this cache of fsspec may deliver wrong bytes; use {_CACHE}")
    source = url.removeprefix(_CACHE)
    if is_cached(url) and "://" not in source:
        raise ValueError(f"{url!r} is on this machine already; name it without {_CACHE}")
    return source


# --- forks ---

_kept_over_fork: list[object] = []


def _keep_over_fork() -> None:
    # fsspec drops its file systems in a forked child. Closing them there would remove their connections from the event
    # loop's watch list, which parent and child share, and the parent would wait forever. So references are kept.
    _kept_over_fork.extend(fs for kind in list(registry.values()) for fs in list(kind._cache.values()))


os.register_at_fork(before=_keep_over_fork, after_in_parent=_kept_over_fork.clear)
