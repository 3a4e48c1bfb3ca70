"""Finds the fsspec file system of a URL."""

import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.registry import registry

from clipfilter_wds.storage.url import ParsedUrl, parse_url

_EXTRA_OF_PROTOCOL = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def filesystem(url: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL or path, and the file's name in it; behind ``simplecache::``, those of the source.

    Call it again in a forked process: the parent's file system doesn't work there.

    Raises:
        ValueError: When its package is not installed, naming the pip command; when there is no such scheme; or as
            ``ParsedUrl.check`` raises.
    """
    parsed = parse_url(url)
    parsed.check()
    if (path := parsed.local_path) is not None:
        return fsspec.filesystem("file", **options), str(path.absolute())
    try:
        if parsed.is_in_archive:
            fs, name = fsspec.core.url_to_fs(parsed.address, **options)
            return fs, name
        kind = fsspec.get_filesystem_class(parsed.scheme)
        fs = fsspec.filesystem(parsed.scheme, **{**kind._get_kwargs_from_urls(parsed.address), **options})
    except ImportError as error:
        raise _missing_package(parsed, error) from None
    return fs, fs._strip_protocol(parsed.address)


def check_installed(url: str) -> None:
    """Check that the package for a URL's scheme is installed, without connecting to anything.

    Raises:
        ValueError: When it is not, naming the pip command. An unknown scheme or cache passes, and fails when it is
            opened.
    """
    parsed = parse_url(url)
    try:
        fsspec.get_filesystem_class(parsed.scheme or "file")
    except ImportError as error:
        raise _missing_package(parsed, error) from None
    except ValueError:
        pass


def _missing_package(url: ParsedUrl, error: ImportError) -> ValueError:
    extra = _EXTRA_OF_PROTOCOL.get(url.scheme or "")
    cure = f"pip install 'clipfilter-wds[{extra}]'" if extra else str(error)
    return ValueError(f"{url.scheme}:// needs a package that is not installed: {cure}")


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether its files are on this machine."""
    return _answers_to(fs, "file")


def is_web(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether its files are on web servers, which can't be written to."""
    return _answers_to(fs, "http")


def _answers_to(fs: fsspec.AbstractFileSystem, scheme: str) -> bool:
    return scheme in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def local_path(url: str) -> Path | None:
    """The path of a URL's file on this machine, or None when it is elsewhere.

    Raises:
        ValueError: As :func:`filesystem`.
    """
    filesystem(url)
    return parse_url(url).local_path


# --- forks ---

_kept_over_fork: list[object] = []


def _keep_over_fork() -> None:
    # fsspec drops its file systems in a forked child. Closing them there would remove their connections from the event
    # loop's watch list, which parent and child share, and the parent would wait forever. So references are kept.
    _kept_over_fork.extend(fs for kind in list(registry.values()) for fs in list(kind._cache.values()))


os.register_at_fork(before=_keep_over_fork, after_in_parent=_kept_over_fork.clear)
