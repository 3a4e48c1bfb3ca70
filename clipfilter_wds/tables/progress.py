"""What scoring a table shows while it works, and when it is done."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from clipfilter_wds.console import plain
from clipfilter_wds.tables.formats.json_lines import BadLines
from clipfilter_wds.tables.tally import PairTally

#: Seconds between two lines when nobody watches a bar.
_LINE_SECONDS = 10.0

#: Takes how the pairs fared and the share of the table, 0 to 1, that is done.
Update = Callable[[PairTally, float], None]


@contextmanager
def show_pairs(console: Console) -> Iterator[Update]:
    """A function that shows how far a table is: as a bar on a terminal, as a line now and then elsewhere."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("scoring"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("scoring", total=1.0, pace="")
        yield lambda tally, done: progress.update(task, completed=done, pace=_pace(tally, done))


def _lines(console: Console) -> Update:
    next_at = time.monotonic() + _LINE_SECONDS

    def update(tally: PairTally, done: float) -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + _LINE_SECONDS
            console.print(f"{tally.counts.seen:,} rows ({done:.0%}), {_pace(tally, done)}", highlight=False)

    return update


def _pace(tally: PairTally, done: float) -> str:
    seconds = max(tally.seconds, 1e-9)
    left = timedelta(seconds=round(seconds / done * (1 - done))) if done else "?"
    return f"{tally.counts.seen / seconds:,.0f} samples/s, {tally.counts.keep_rate:.1%} kept, {left} left"


def print_pair_summary(console: Console, tally: PairTally, bad_lines: BadLines) -> None:
    """Print the closing table, and what could not be scored or read."""
    counts = tally.counts
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    table.add_row("seen", f"{counts.seen:,}", "")
    table.add_row("[bold]kept[/]", f"{counts.kept:,}", f"{counts.keep_rate:.1%}")
    for reason, count in counts.dropped.items():
        table.add_row(f"dropped: {reason}", f"{count:,}", f"{count / counts.seen:.1%}")
    if tally.truncated_captions:
        table.add_row("captions truncated", f"{tally.truncated_captions:,}", "")
    if bad_lines.count:
        table.add_row("lines passed over", f"{bad_lines.count:,}", "")
    pace = f"{counts.seen / tally.seconds:,.0f} samples/s"
    table.add_row("time", str(timedelta(seconds=round(tally.seconds))), pace)
    console.print(table)
    notes = [f"scored 0.0 as {line}" for line in tally.describe_unusable()]
    if bad_lines.count:
        notes.append(f"passed over {bad_lines}")
    for note in notes:
        console.print(plain(note), highlight=False, soft_wrap=True)
