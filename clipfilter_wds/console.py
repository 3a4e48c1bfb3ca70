"""Shows on a terminal how far a run is and what came of it, and makes other people's text safe to show there."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

#: Seconds between two lines where there is no bar.
_LINE_SECONDS = 10.0

#: Columns of the bar, at most, and between its neighbours and it.
_BAR_WIDTH, _GAPS = 40, 2

#: A row of the closing table: what is counted, the count, and the whole that it is a share of, or a text instead.
Row = tuple[str, int, int | str]


def printable(text: str) -> str:
    """The text with control characters (escape codes, bells, changes of direction, line ends) written out.

    Names of shards, keys and what libraries say of them come from whoever made the data, and a terminal obeys them.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def plain(text: str) -> str:
    """The same for rich, whose markup is shown and not obeyed."""
    return escape(printable(text))


# --- while a run works ---


class Shown(NamedTuple):
    """What is shown of a running job.

    Attributes:
        phase: What is being done, such as ``scoring``.
        share: How much of it is done, 0 to 1.
        beside_bar: Text on the right of the bar, in rich's markup.
        pace: Text behind that, where there is room for it.
        line: Text of a line, where there is no bar.
    """

    phase: str
    share: float
    beside_bar: str
    pace: str
    line: str


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[Shown], None]]:
    """A function that shows how far a run is: as a bar on a terminal, elsewhere as a line now and then."""
    if not console.is_terminal:
        yield _lines(console)
        return
    bar = BarColumn(bar_width=min(_BAR_WIDTH, max(console.width // 4, 1)))
    columns = (TextColumn("{task.description}"), bar, TextColumn("{task.fields[beside_bar]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("scoring", total=1.0, beside_bar="")

        def update(shown: Shown) -> None:
            text = f"{shown.beside_bar}  {shown.pace}" if shown.pace else shown.beside_bar
            taken = len(shown.phase) + (bar.bar_width or 0) + Text.from_markup(text).cell_len + _GAPS
            fits = taken <= console.width
            beside_bar = text if fits else shown.beside_bar
            progress.update(task, description=shown.phase, completed=shown.share, beside_bar=beside_bar)

        yield update


def _lines(console: Console) -> Callable[[Shown], None]:
    next_at = time.monotonic() + _LINE_SECONDS

    def update(shown: Shown) -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + _LINE_SECONDS
            console.print(shown.line, highlight=False)

    return update


def pace(
    samples_per_second: float, keep_rate: float | None, seconds_left: float | None, *, kept_as: str = "kept"
) -> str:
    """How fast a run is, what it keeps and how long it will take; what is None is left out."""
    parts = [_speed(samples_per_second)]
    if keep_rate is not None:
        parts.append(f"{keep_rate:.1%} {kept_as}")
    if seconds_left is not None:
        parts.append(f"{_duration(seconds_left)} left")
    return ", ".join(parts)


# --- when it is done ---


def print_summary(
    console: Console, rows: Iterable[Row], *, seconds: float, samples_per_second: float, notes: Iterable[str]
) -> None:
    """Print the closing table, whose last row is the time taken, and below it a line per note, in rich's markup."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    for what, count, whole in rows:
        table.add_row(what, f"{count:,}", whole if isinstance(whole, str) else f"{count / whole:.1%}" if whole else "")
    table.add_row("time", _duration(seconds), _speed(samples_per_second))
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def count_rows(seen: int, kept: int, dropped: Iterable[tuple[str, int]], *, kept_as: str = "kept") -> list[Row]:
    """The first rows of a closing table: how many samples were seen, kept, and dropped for which reason."""
    dropped_rows = [(f"dropped: {reason}", count, seen) for reason, count in dropped]
    return [("seen", seen, ""), (f"[bold]{kept_as}[/]", kept, seen), *dropped_rows]


def _speed(samples_per_second: float) -> str:
    return f"{samples_per_second:,.0f} samples/s"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
