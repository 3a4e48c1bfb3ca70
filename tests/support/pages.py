"""Reads pages of the documentation, so that a test can go through their tables and run their code.

``python -m tests.support.pages`` prints how many blocks of code there are, and why some are not run; with a page and a
section behind it, the commands of that section.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

_BLOCK = re.compile(
    r"^(?:<!-- (not run|run by): ([^\n]+) -->\n)?```(bash|diff|python|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """Code of a page.

    Attributes:
        language: bash, diff, python or yaml; other blocks show what is printed.
        code: The lines.
        not_run: Why no test runs it, as the comment above it says; empty where one does.
        run_by: The file that runs it, as the comment says; empty where tests of the documentation do.
    """

    language: str
    code: str
    not_run: str = ""
    run_by: str = ""


def blocks_of(text: str) -> list[Block]:
    """The blocks of code of a page or a section, in order."""
    found = []
    for mark, what, language, code in _BLOCK.findall(text):
        found.append(Block(language, code, **({mark.replace(" ", "_"): what} if mark else {})))
    return found


def section_of(text: str, name: str) -> str:
    """What stands below a heading, sections within it included."""
    level, rest = re.search(rf"^(#+) {re.escape(name)}\n(.*)", text, flags=re.DOTALL | re.MULTILINE).groups()
    return re.split(rf"^#{{1,{len(level)}}} ", rest, flags=re.MULTILINE)[0]


def lines_of(section: str) -> list[tuple[str, ...]]:
    """The cells of each line of all tables in a ``## section`` of the page on inputs, without their heads."""
    pages = "\n".join(page.read_text() for page in sorted(DOCS.glob("inputs*.md")))
    [text] = [part for part in re.split(r"^## ", pages, flags=re.MULTILINE) if part.startswith(f"{section}\n")]
    return cells_of(text)


def cells_of(text: str) -> list[tuple[str, ...]]:
    """The cells of each line of all tables in a text, without their heads."""
    found, above = [], ""
    for line in text.splitlines():
        is_head = not above.startswith("|")
        if line.startswith("|") and not is_head and not set(line) <= set("|-"):
            found.append(tuple(cell.strip() for cell in line.split("|")[1:-1]))
        above = line
    return found


def main() -> None:
    """See above."""
    if len(sys.argv) == 3:
        section = section_of((ROOT / sys.argv[1]).read_text(), sys.argv[2])
        print("".join(block.code for block in blocks_of(section) if block.language == "bash" and not block.not_run))
        return
    blocks = [block for page in PAGES for block in blocks_of(page.read_text())]
    left_out = Counter(block.not_run for block in blocks if block.not_run)
    print(f"{len(blocks) - left_out.total()} of {len(blocks)} blocks of code in the documents are run by tests")
    for why, count in left_out.most_common():
        print(f"{count} not: {why}")


if __name__ == "__main__":
    main()
