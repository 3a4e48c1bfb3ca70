"""Says why a run kept nothing, and what to do where samples lack an image, a caption or a field."""

import shlex
from collections.abc import Iterator, Mapping

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.null_columns import describe_null_columns
from clipfilter_wds.offline.tally import ShardStats, Tally
from clipfilter_wds.shards.found import LINK
from clipfilter_wds.shards.lacking import describe_lacking, list_counts
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.types import DropReason, FilterStats


def advice(tally: Tally, config: ScoreConfig, *, reports: bool = False) -> Iterator[str]:
    """A line each: that samples lack something, that there were links, or nulls, and why nothing was kept.

    A report is not told to make where one is made anyway, as ``reports`` says.
    """
    stats = tally.stats
    if stats.is_lacking:
        yield _lacking(stats, config.layout)
    elif tally.num_lacking_shards:
        where = f"in {tally.num_lacking_shards:,} of {tally.done:,} shards, "
        yield where + _lacking(tally.lacking, config.layout)
    links = {name.removeprefix(LINK): count for name, count in stats.members.items() if name.startswith(LINK)}
    if links:
        yield (
            f"links are passed over: {list_counts(links)}. GNU tar writes a file that it meets again as a hard link; "
            "write the shards anew with `tar --dereference --hard-dereference`"
        )
    yield from describe_null_columns(stats, config)
    if tally.done and not stats.counts.seen:
        yield "the shards hold no sample: the members of one are named KEY.EXTENSION, as are 0001.jpg and 0001.txt"
    elif stats.counts.seen and not stats.counts.kept:
        yield _nothing_kept(stats, config, reports)


# --- samples that lack an image or a caption ---


def _lacking(stats: ShardStats, layout: SampleLayout) -> str:
    def write(options: Mapping[str, str]) -> str:
        return " ".join(f"--{name} {value}" for name, value in options.items())

    return describe_lacking(stats.num_lacking, stats.counts.seen, stats.members, layout, write)


# --- nothing kept ---


def _nothing_kept(stats: ShardStats, config: ScoreConfig, reports: bool) -> str:
    counts = stats.counts
    by_count = sorted(counts.dropped.items(), key=lambda item: -item[1])
    why = ", ".join(f"{count:,} {reason}" for reason, count in by_count)
    if not isinstance(config, RewriteConfig):
        return f"none of {counts.seen:,} samples could be scored: {why}"
    line = f"none of {counts.seen:,} samples is kept: {why}"
    if by_count[0][0] is DropReason.BELOW_THRESHOLD and config.choice.threshold is not None:
        line += f". The threshold is {config.choice.threshold:g}"
        if not reports:
            scores = shlex.quote(without_secrets(str(config.scores or config.output)))
            line += f"; `clipfilter-wds report {scores} --output report.html` shows what others would keep"
    elif config.choice.subset is not None and config.limit is None and _is_none_listed(counts):
        line += f". None of the {config.choice.subset.describe()} is in these shards"
    return line


def _is_none_listed(counts: FilterStats) -> bool:
    """Whether no sample is in the subset, of those that could be read."""
    unread = counts.dropped.get(DropReason.TORN, 0) + counts.dropped.get(DropReason.MEMBER_TOO_LARGE, 0)
    return counts.seen > unread and counts.dropped.get(DropReason.NOT_IN_SUBSET, 0) == counts.seen - unread
