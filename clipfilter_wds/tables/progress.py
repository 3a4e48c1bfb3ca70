"""Says how far scoring a table is, and at the end what came of it."""

from pathlib import Path

from rich.console import Console

from clipfilter_wds.console import Row, Shown, count_rows, pace, plain, print_summary
from clipfilter_wds.tables.formats.json_lines import BadLines
from clipfilter_wds.tables.tally import PairTally
from clipfilter_wds.types import DropReason


def shown(tally: PairTally, share: float, *, decides: bool = True) -> Shown:
    """What is shown while a table is scored, of which ``share`` is done, 0 to 1, and maybe decided at once."""
    seconds_left = tally.seconds / share * (1 - share) if share else None
    how_fast = pace(_samples_per_second(tally), tally.counts.keep_rate if decides else None, seconds_left)
    return Shown(
        phase="scoring",
        share=share,
        beside_bar=f"[progress.percentage]{share:4.0%}[/]",
        pace=how_fast,
        line=f"{tally.counts.seen:,} rows ({share:.0%}), {how_fast}",
    )


def print_pair_summary(
    console: Console, output: Path, tally: PairTally, bad_lines: BadLines, threshold: float | None
) -> None:
    """Print the closing table, what could not be scored or read, and where nothing is kept why."""
    counts = tally.counts
    rows = count_rows(counts.seen, counts.kept, counts.dropped.items())
    more: list[Row] = [
        ("captions truncated", tally.truncated_captions, counts.seen),
        ("lines passed over", bad_lines.count, ""),
    ]
    notes = [] if tally.cutoff is None else [tally.cutoff]
    notes += [f"scored 0.0 as {line}" for line in tally.describe_unusable()]
    if bad_lines.count:
        notes.append(f"passed over {bad_lines}")
    is_empty = counts.seen > 0 and counts.kept == 0
    notes.append(_nothing_kept(tally, threshold) if is_empty else f"the kept rows are in {output}")
    print_summary(
        console,
        rows + [row for row in more if row[1]],
        seconds=tally.seconds,
        samples_per_second=_samples_per_second(tally),
        notes=map(plain, notes),
    )


def _nothing_kept(tally: PairTally, threshold: float | None) -> str:
    dropped = tally.counts.dropped
    by_count = sorted(dropped.items(), key=lambda item: -item[1])
    line = f"none of {tally.counts.seen:,} rows is kept: " + ", ".join(f"{n:,} {reason}" for reason, n in by_count)
    if by_count[0][0] is not DropReason.BELOW_THRESHOLD or threshold is None:
        return line
    scored = "`--threshold 0 --score_key clip_score` writes all rows with their scores"
    return f"{line}. The threshold is {threshold:g}; {scored}"


def _samples_per_second(tally: PairTally) -> float:
    return tally.counts.seen / max(tally.seconds, 1e-9)
