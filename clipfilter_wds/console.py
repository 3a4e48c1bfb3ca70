"""Text from elsewhere -> text that a terminal only shows."""

from rich.markup import escape


def printable(text: str) -> str:
    """The text with control characters (escape codes, bells, changes of direction, line ends) written out.

    Names of shards, keys and what libraries say of them come from whoever made the data, and a terminal obeys them.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def plain(text: str) -> str:
    """The same for rich, which has a markup of its own."""
    return escape(printable(text))


def share(part: int, whole: int) -> str:
    """A share in per cent, blank when there is no whole."""
    return f"{part / whole:.1%}" if whole else ""
