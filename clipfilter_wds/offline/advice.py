"""Says why a run kept nothing, and what to do where samples lack an image or a caption."""

from collections.abc import Iterable, Iterator, Mapping

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.tally import ShardStats, Tally
from clipfilter_wds.shards.found import LINK
from clipfilter_wds.shards.samples import IMAGE_EXTENSIONS, SampleLayout
from clipfilter_wds.types import DropReason

_MAX_NAMED = 10
#: How the last part of a name ends that is probably a caption's, best first.
_CAPTION_NAMES = ("txt", "caption", "text", "captions", "cap", "alt", "description", "title")


def advice(tally: Tally, config: ScoreConfig) -> Iterator[str]:
    """A line each: that samples lack something, that there were links, and why nothing was kept."""
    stats = tally.stats
    if stats.is_lacking:
        yield _lacking(stats, config.layout)
    elif tally.num_lacking_shards:
        where = f"in {tally.num_lacking_shards:,} of {tally.done:,} shards, "
        yield where + _lacking(tally.lacking, config.layout)
    links = {name.removeprefix(LINK): count for name, count in stats.members.items() if name.startswith(LINK)}
    if links:
        yield (
            f"links are passed over: {_listed(links)}. GNU tar writes a file that it meets again as a hard link; write "
            "the shards anew with `tar --dereference --hard-dereference`"
        )
    if tally.done and not stats.counts.seen:
        yield "the shards hold no sample: the members of one are named KEY.EXTENSION, as are 0001.jpg and 0001.txt"
    elif stats.counts.seen and not stats.counts.kept:
        yield _nothing_kept(stats, config)


# --- samples that lack an image or a caption ---


def _lacking(stats: ShardStats, layout: SampleLayout) -> str:
    num_samples = stats.counts.seen
    members = {name: count for name, count in stats.members.items() if not name.startswith(LINK)}
    fields = [name for name in members if ":" in name]
    extensions = {name: count for name, count in members.items() if name not in fields}
    lacking = {}
    if not _is_there(layout.image_extensions, members, num_samples):
        lacking["an image"] = f"--image {_likely_image(members, layout) or 'EXTENSION'}"
    if not _is_there(_caption_names(layout), members, num_samples):
        lacking["a caption"] = f"--caption {_likely_caption(members, layout) or 'EXTENSION'}"
    if len(extensions) > max(_MAX_NAMED, num_samples):
        cure = "A key ends at a name's first dot: replace the dots in the keys"
    elif any(LINK + name in stats.members for name in (*layout.image_extensions, *layout.caption_extensions)):
        cure = "The others are links"
    elif lacking:
        cure = f"Name the right ones: {' '.join(lacking.values())}"
    else:
        cure = "An image and its caption have the same name, folders included, up to the first dot"
    found = "Their score tables don't tell the names of members: score them again"
    if members:
        found = f"Their members' extensions are {_listed(extensions)}"
        found += f"; fields {', '.join(fields[:_MAX_NAMED])}" if fields else ""
    lack = " and ".join(lacking) or "an image or a caption"
    return f"{stats.num_lacking:,} of {num_samples:,} samples lack {lack}. {found}. {cure}"


def _is_there(names: Iterable[str], members: Mapping[str, int], num_samples: int) -> bool:
    """Whether members, or fields, of these names were found, in more than a few samples."""
    found = [name for name in names if name in members]
    return any(":" in name for name in found) or sum(members[name] for name in found) > 0.1 * num_samples


def _caption_names(layout: SampleLayout) -> list[str]:
    return [extension if field is None else f"{extension}:{field}" for extension, field in layout.caption_sources]


def _likely_image(members: Mapping[str, int], layout: SampleLayout) -> str | None:
    alike = [name for name in members if _last(name) in IMAGE_EXTENSIONS and ":" not in name]
    return next((name for name in alike if name not in layout.image_extensions), None)


def _likely_caption(members: Mapping[str, int], layout: SampleLayout) -> str | None:
    tried = _caption_names(layout)
    alike = [name for name in members if _last(name) in _CAPTION_NAMES and name not in tried]
    in_json = ":" in layout.caption
    return min(alike, key=lambda name: ((":" in name) != in_json, _CAPTION_NAMES.index(_last(name))), default=None)


def _last(name: str) -> str:
    """The last part of an extension, or of a field."""
    return name.rpartition(":")[2].rpartition(".")[2].lower()


# --- nothing kept ---


def _nothing_kept(stats: ShardStats, config: ScoreConfig) -> str:
    counts = stats.counts
    by_count = sorted(counts.dropped.items(), key=lambda item: -item[1])
    why = ", ".join(f"{count:,} {reason}" for reason, count in by_count)
    if not isinstance(config, RewriteConfig):
        return f"none of {counts.seen:,} samples could be scored: {why}"
    line = f"none of {counts.seen:,} samples is kept: {why}"
    if by_count[0][0] is DropReason.BELOW_THRESHOLD and config.choice.threshold is not None:
        scores = config.scores or config.output
        line += (
            f". The threshold is {config.choice.threshold:g}; `clipfilter-wds report {scores} --output report.html` "
            "shows what others would keep"
        )
    return line


def _listed(counts: Mapping[str, int]) -> str:
    """Names with their counts, the most frequent first."""
    by_count = sorted(counts.items(), key=lambda item: -item[1])
    more = [f"and {len(by_count) - _MAX_NAMED} others"] if len(by_count) > _MAX_NAMED else []
    return ", ".join([*(f"{name or 'none'} ({count:,})" for name, count in by_count[:_MAX_NAMED]), *more])
