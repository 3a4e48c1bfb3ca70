"""Says how far scoring a table is, and at the end what came of it."""

from collections.abc import Iterator

from clipfilter_wds.console import Row, Shown, count_rows, pace, plain, share_row, time_row
from clipfilter_wds.tables.formats.json_lines import BadLines
from clipfilter_wds.tables.tally import PairTally


def shown(tally: PairTally, share: float) -> Shown:
    """What is shown while a table is scored, of which ``share`` is done, 0 to 1."""
    seconds_left = tally.seconds / share * (1 - share) if share else None
    how_fast = pace(_samples_per_second(tally), tally.counts.keep_rate, seconds_left)
    return Shown(
        phase="scoring",
        share=share,
        beside_bar=f"[progress.percentage]{share:4.0%}[/] {how_fast}",
        line=f"{tally.counts.seen:,} rows ({share:.0%}), {how_fast}",
    )


def summary_rows(tally: PairTally, bad_lines: BadLines) -> Iterator[Row]:
    """The rows of the closing table."""
    yield from count_rows(tally.counts.seen, tally.counts.kept, tally.counts.dropped.items())
    if tally.truncated_captions:
        yield share_row("captions truncated", tally.truncated_captions, tally.counts.seen)
    if bad_lines.count:
        yield "lines passed over", f"{bad_lines.count:,}", ""
    yield time_row(tally.seconds, _samples_per_second(tally))


def notes(tally: PairTally, bad_lines: BadLines) -> Iterator[str]:
    """What could not be scored or read, a line each."""
    for line in tally.describe_unusable():
        yield plain(f"scored 0.0 as {line}")
    if bad_lines.count:
        yield plain(f"passed over {bad_lines}")


def _samples_per_second(tally: PairTally) -> float:
    return tally.counts.seen / max(tally.seconds, 1e-9)
