"""Checks the options of a report. Imports neither torch nor pyarrow."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.paths import AnyPath, RemotePath, any_path
from clipfilter_wds.storage.publish import check_writable

#: More of them would make a page that is slow to open on a phone.
_MAX_THUMBNAILS = 200

#: What a file begins with that a report may replace: HTML as this or another program writes it, or nothing.
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html|<!--|\Z)", re.IGNORECASE)
_START_BYTES = 1 << 10
_MAX_PAGE_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Input and output of ``report``.

    Attributes:
        scores: The output folder of ``score``, or of a ``rewrite`` that scored. For a ``rewrite --scores``, the folder
            of those scores, with its output as ``run``.
        output: HTML file to write. A web page that exists is replaced, any other file never. The page holds all that it
            shows, and loads nothing from elsewhere.
        shards: The shards that were scored, for captions and pictures, wherever they are now. Of shards that are not
            named, or not there, the report shows neither. May be given several times.
        run: The output folder of the ``rewrite`` to show, where it chose by ``scores`` that were made before
            (``rewrite --scores``).
        compare: Folder of other scores of just the same shards, to show how many samples these decide otherwise when
            they keep as many, and which differ most in rank.
        threshold: Where the slider starts; by default at the run's own threshold, or where its fraction was cut. For
            scores that are no cosines and have neither, in their middle.
        thumbnails: How many samples to show, at most 200.

    Raises:
        ValueError: When an option can't be used.
    """

    scores: str | Path
    output: str | Path
    shards: str | Path | Sequence[str | Path] | None = None
    run: str | Path | None = None
    compare: str | Path | None = None
    threshold: float | None = None
    thumbnails: int = 120

    def __post_init__(self) -> None:
        if self.threshold is not None:
            from clipfilter_wds.scores.folder import kind_of_scores  # imports pyarrow, for this alone

            kind_of_scores(self.scores).check_threshold(self.threshold)
        if not 0 <= self.thumbnails <= _MAX_THUMBNAILS:
            raise ValueError(f"thumbnails is {self.thumbnails}; it must lie in 0..{_MAX_THUMBNAILS}")
        check_page(self.output, of=self.scores)


@dataclass(frozen=True, kw_only=True)
class RunReportConfig:
    """Report about the run.

    Attributes:
        report: HTML file to write that shows what was kept and dropped; by default none is written. A web page that
            exists is replaced, any other file never.
    """

    report: str | Path | None = None


def check_page(output: str | Path, *, of: str | Path, writes: bool = True) -> None:
    """Check that a page can be written, and made from the score tables in a folder that may not exist yet.

    Args:
        output: The HTML file.
        of: The folder of score tables.
        writes: Whether it is written now, so that its folder is tried.

    Raises:
        ValueError: When it can't be written, would replace what is no page, or the tables are on remote storage.
    """
    if isinstance(any_path(of), RemotePath):
        raise ValueError(
            f"a report is made from score tables of this machine; {without_secrets(str(of))!r} is not here"
        )
    if str(output).endswith("/"):
        raise ValueError(f"output {without_secrets(str(output))!r} is a folder; name a file")
    path = any_path(output)
    if writes:
        check_writable(path, as_file=True)
    _check_replaceable(path)


def _check_replaceable(path: AnyPath) -> None:
    """Refuse to replace anything but a web page, or an empty file."""
    if isinstance(path, Path) and path.is_dir():
        raise ValueError(f"output {str(path)!r} is a folder; name a file")
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise ValueError(f"output {str(path)!r} is no ordinary file; name an HTML file to write")
    try:
        start = _start_of(path)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"can't see whether output {str(path)!r} is a web page to replace: {why}") from None
    if not _PAGE.match(start):
        raise ValueError(
            f"output {str(path)!r} is there and is no web page, which alone a report replaces; name another file"
        )


def _start_of(path: AnyPath) -> bytes:
    """The first bytes of a file, none where it isn't there."""
    if isinstance(path, RemotePath):
        # Other storage gives files whole, and what is larger than any report is none.
        num_bytes = path.num_bytes() or 0
        return path.read_bytes() if 0 < num_bytes <= _MAX_PAGE_BYTES else bytes(num_bytes > 0)
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return file.read(_START_BYTES)
