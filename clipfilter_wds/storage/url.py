"""Parses URLs and paths: what one means and what it is called come from here, so that both are of one file."""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from clipfilter_wds.storage.errors import without_secrets

#: The cache of fsspec that is read, in a way of its own.
CACHE = "simplecache::"
_UNSAFE_CACHES = ("filecache::", "blockcache::", "cached::")
#: Schemes of files within another file, which stands behind ``::``.
_ARCHIVES = ("zip", "tar", "libarchive", "reference", "dir")
_WEB, _LOCAL = ("http", "https"), ("file", "local")

_URL = re.compile(r"((?:[A-Za-z][\w+-]*::)*)([A-Za-z][\w+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedUrl:
    """What a URL or path means.

    Only ``://`` makes a URL; all other text is a path of this machine as it stands, whatever characters it holds.

    Attributes:
        caches: fsspec's caches that it names, each followed by ``::``; empty for none.
        scheme: ``s3``, ``file`` and so on; None for a path.
        source: The URL without caches, or the path.
    """

    caches: str
    scheme: str | None
    source: str

    @property
    def address(self) -> str:
        """The URL without caches, its scheme in lower case, as fsspec knows it; or the path."""
        return self.source if self.scheme is None else self.scheme + self.source[len(self.scheme) :]

    @property
    def is_web(self) -> bool:
        """Whether it is on a web server, where ``?`` begins a query."""
        return self.scheme in _WEB

    @property
    def is_in_archive(self) -> bool:
        """Whether it is a file within another file."""
        return self.scheme in _ARCHIVES

    @property
    def local_path(self) -> Path | None:
        """Its path on this machine, None when it is elsewhere."""
        if self.scheme is None:
            return Path(os.path.expanduser(self.source))  # noqa: PTH111  # Path's own fails on a name like ~x.tar
        return Path(_behind_scheme(self.source)) if self.scheme in _LOCAL else None

    @property
    def place(self) -> str:
        """Where it is, as names are made of it: host or bucket and path, without user, password, query and scheme."""
        if (path := self.local_path) is not None:
            return str(path) if self.source.rpartition("/")[2] else f"{path}/"
        place = re.sub(r"^[^/]*@", "", _behind_scheme(self.source))
        return re.split(r"[?#]" if self.is_web else r"\?(?=.*=)", place, maxsplit=1, flags=re.DOTALL)[0]

    @property
    def public(self) -> str:
        """What it is called: the absolute URL or path without user, password and query, which may be secret."""
        if (path := self.local_path) is not None:
            return real_path(path)
        return f"{self.scheme}://{self.place}"

    def check(self) -> None:
        """Check that it can be read as it says.

        Raises:
            ValueError: When it names a cache that may deliver wrong bytes, or that is not known.
        """
        if self.caches.startswith(_UNSAFE_CACHES):
            raise ValueError(
                f"{without_secrets(str(self))!r}: this cache of fsspec may deliver wrong bytes; use {CACHE}"
            )
        if self.caches not in ("", CACHE):
            raise ValueError(
                f"{without_secrets(str(self))!r}: {self.caches} is not known; the cache that is, is {CACHE}, "
                f"and a file of that name is written ./{self.caches.partition('::')[0]}"
            )
        if self.caches and self.local_path is not None:
            raise ValueError(f"{str(self)!r} is on this machine already; name it without {CACHE}")

    def __str__(self) -> str:
        return self.caches + self.source


def parse_url(url: str) -> ParsedUrl:
    """What a URL or path means."""
    found = _URL.fullmatch(url)
    if found is None:
        return ParsedUrl(caches="", scheme=None, source=url)
    caches, scheme, _ = found.groups()
    return ParsedUrl(caches=caches, scheme=scheme.lower(), source=url.removeprefix(caches))


def is_there(path: Path) -> bool:
    """Whether a path has a file, a folder or a link of any kind; also where it can't be looked at."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def real_path(path: Path) -> str:
    """A text that is the same for all ways to write one path. A link that leads nowhere, or to itself, is itself."""
    if os.path.exists(path):  # noqa: PTH110  # Path's own fails where it may not look
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118


def _behind_scheme(url: str) -> str:
    return url.partition("://")[2]
