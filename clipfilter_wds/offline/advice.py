"""Says why a run kept nothing, and what to do where samples lack an image or a caption."""

from collections.abc import Iterator, Mapping

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
    members = {name: count for name, count in stats.members.items() if not name.startswith(LINK)}
    fields = [name for name in members if ":" in name]
    lacks_image, lacks_caption = _what_lacks(stats, members, layout)
    cures = {}
    if lacks_image:
        cures["an image"] = f"--image {_likely_image(members, layout) or 'EXTENSION'}"
    if lacks_caption:
        cures["a caption"] = f"--caption {_likely_caption(members, layout) or 'EXTENSION'}"
    found = _listed({name: count for name, count in members.items() if name not in fields})
    if fields:
        found += f"; fields {', '.join(fields[:_MAX_NAMED])}"
    return (
        f"{stats.num_lacking:,} of {stats.counts.seen:,} samples lack {' and '.join(cures)}. "
        f"Their members' extensions are {found}. Name the right ones: {' '.join(cures.values())}"
    )


def _what_lacks(stats: ShardStats, members: Mapping[str, int], layout: SampleLayout) -> tuple[bool, bool]:
    """Whether images lack, and captions: a sample that lacks both counts as one without image only."""
    num_without_image = stats.counts.dropped.get(DropReason.MISSING_IMAGE, 0)
    lacks_image = 2 * num_without_image >= stats.num_lacking
    has_caption_member = any(extension in members for extension in layout.caption_extensions)
    return lacks_image, not lacks_image or not has_caption_member


def _likely_image(members: Mapping[str, int], layout: SampleLayout) -> str | None:
    alike = [name for name in members if _last(name) in IMAGE_EXTENSIONS and ":" not in name]
    return next((name for name in alike if name not in layout.image_extensions), None)


def _likely_caption(members: Mapping[str, int], layout: SampleLayout) -> str | None:
    tried = [source.strip().lower() for source in layout.caption.split(",")]
    alike = [name for name in members if _last(name) in _CAPTION_NAMES and name.lower() not in tried]
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
    return ", ".join([*(f"{name} ({count:,})" for name, count in by_count[:_MAX_NAMED]), *more]) or "nothing"
