"""Finds the fsspec file system of a URL."""

import os
from typing import Any

import fsspec
from fsspec.registry import registry

_EXTRA_OF_PROTOCOL = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def filesystem(url: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL or path, and the file's name in it.

    Ask again in a forked process: a file system of its parent is of no use there.

    Raises:
        ValueError: When its package is not installed, naming the pip command; or when there is no such scheme.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        protocol = fsspec.utils.get_protocol(url)
        extra = _EXTRA_OF_PROTOCOL.get(protocol)
        cure = f"pip install 'clipfilter-wds[{extra}]'" if extra else str(error)
        raise ValueError(f"{protocol}:// needs a package that is not installed: {cure}") from None
    return fs, path


def protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """The schemes that a file system answers to."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether its files are this machine's."""
    return "file" in protocols(fs)


# --- forks ---

_kept_over_fork: list[object] = []


def _keep_over_fork() -> None:
    # fsspec drops its file systems in a forked child. Closing them there would take their connections off the event
    # loop's list of what to watch, which parent and child share, and the parent would wait for ever. So they are kept.
    _kept_over_fork.extend(fs for kind in list(registry.values()) for fs in list(kind._cache.values()))


os.register_at_fork(before=_keep_over_fork, after_in_parent=_kept_over_fork.clear)
