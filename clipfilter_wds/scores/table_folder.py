"""Finds the folder of score tables in what a user names. Imports nothing heavy."""

from pathlib import Path

from clipfilter_wds.storage.errors import without_secrets


def table_folder(folder: str | Path) -> Path:
    """The folder that holds a run's tables, given it or the run's output folder.

    Raises:
        ValueError: When it is not on this machine, has no name, or can't be looked into.
    """
    if "://" in str(folder):
        raise ValueError(
            f"score tables are read from this machine; copy {without_secrets(str(folder))!r} to a local folder first"
        )
    if not str(folder).strip():  # as of a variable that is not set; a path would take it for the current folder
        raise ValueError("scores is empty; name the folder of score tables")
    folder = Path(folder).expanduser()
    try:
        return folder / "_scores" if (folder / "_scores").is_dir() else folder
    except OSError as error:
        raise ValueError(f"can't look for score tables in {str(folder)!r}: {error.strerror or error}") from None
