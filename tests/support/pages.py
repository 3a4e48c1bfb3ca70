"""Reads the tables of a page of the documentation, so that a test can go through their lines."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def lines_of(section: str) -> list[tuple[str, ...]]:
    """The cells of each line of all tables in a ``## section`` of the page on inputs, without their heads."""
    pages = "\n".join(page.read_text() for page in sorted(DOCS.glob("inputs*.md")))
    [text] = [part for part in re.split(r"^## ", pages, flags=re.MULTILINE) if part.startswith(f"{section}\n")]
    found, above = [], ""
    for line in text.splitlines():
        is_head = not above.startswith("|")
        if line.startswith("|") and not is_head and not set(line) <= set("|-"):
            found.append(tuple(cell.strip() for cell in line.split("|")[1:-1]))
        above = line
    return found
