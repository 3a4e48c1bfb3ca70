"""Keeps outputs out of the folders of score tables that they are made of. Imports nothing heavy."""

from pathlib import Path

from clipfilter_wds.scores.table_folder import table_folder
from clipfilter_wds.storage.paths import AnyPath, folder_identity


def check_apart(output: AnyPath, scores: str | Path) -> None:
    """Refuse an output folder whose files would mix with the score tables of another.

    Args:
        output: The output folder.
        scores: Folder of tables, or one that holds ``_scores``.

    Raises:
        ValueError: When one of both is, or lies within, the other; or as :func:`table_folder`.
    """
    tables = table_folder(scores)
    one, other = folder_identity(output), folder_identity(tables)
    if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
        raise ValueError(f"output {str(output)!r} would mix with the tables in {str(tables)!r}; choose another folder")
