"""Checks the options of a report. Imports neither torch nor pyarrow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.paths import RemotePath, any_path
from clipfilter_wds.storage.publish import check_writable

#: More of them would make a page that is slow to open on a phone.
_MAX_THUMBNAILS = 200


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Input and output of ``report``.

    Attributes:
        scores: The output folder of ``score`` or ``rewrite``.
        output: HTML file to write; one that exists is replaced. It holds all that it shows, and loads nothing from
            elsewhere.
        shards: The shards that were scored, for captions and pictures, wherever they are now; by default the report
            has none, and of those that are not there neither.
        run: The output folder of the ``rewrite`` to show, where its score tables are elsewhere (``rewrite --scores``).
        compare: Another folder of scores of the same shards, no more and no fewer, to show how many samples it decides
            otherwise where as many are kept, and which differ most in rank.
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
        report: HTML file to write that shows what was kept and dropped; by default none is written.
    """

    report: str | Path | None = None


def check_page(output: str | Path, *, of: str | Path) -> None:
    """Check that a page can be written, and made from the score tables in a folder that may not exist yet.

    Raises:
        ValueError: When it can't be written, or the tables are on remote storage.
    """
    if isinstance(any_path(of), RemotePath):
        raise ValueError(
            f"a report is made from score tables of this machine; {without_secrets(str(of))!r} is not here"
        )
    check_writable(any_path(output), as_file=True)
