"""Keeps the demo out of a folder that holds other people's files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from clipfilter_wds.demo.overview import is_overview
from clipfilter_wds.report.config import check_page

SHARDS, FILTERED, REPORT, OVERVIEW = "shards", "filtered", "report.html", "overview.png"


def check_own(folder: Path, shards: Mapping[str, bytes]) -> None:
    """Refuse to write where that would replace, or mix with, what the demo did not write.

    A shard is the demo's own if it is bit for bit the one that it would write. Where all of them are, an earlier demo
    was here, and what it made of them is its own, too: the filtered shards, which say of themselves what they are, the
    picture, if it is signed, and the report, if it is a web page.

    Args:
        folder: The output folder.
        shards: By file name, the shards that the demo would write there.

    Raises:
        ValueError: When the folder holds a file that is not the demo's, or can't be looked into.
    """
    try:
        other = next(_others(folder, shards), None)
    except OSError as error:
        found = error.filename or str(folder)
        raise ValueError(f"can't see what {found!r} is, which may not be replaced: {error.strerror or error}") from None
    if other is not None:
        raise ValueError(
            f"output {str(folder)!r} holds {other!r}, which this version's demo did not write; choose another folder, "
            "or delete what an older demo has left there"
        )
    check_page(folder / REPORT, of=folder)


def _others(folder: Path, shards: Mapping[str, bytes]) -> Iterator[str]:
    """The files and folders, relative to the output, that stand in the way."""
    there = folder / SHARDS
    found = sorted(path for path in there.iterdir() if path.name[0] != ".") if there.is_dir() else []
    own = {path.name for path in found if _holds(path, shards.get(path.name, b""))}
    yield from (f"{SHARDS}/{path.name}" for path in found if path.name not in own)
    if (folder / OVERVIEW).exists() and not is_overview(folder / OVERVIEW):
        yield OVERVIEW
    if own != set(shards):
        yield from (name for name in (FILTERED, REPORT, OVERVIEW) if (folder / name).exists())


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) > 0 and path.read_bytes() == data
