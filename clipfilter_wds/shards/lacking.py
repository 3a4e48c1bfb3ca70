"""Says what the members of samples are called that lack an image or a caption, and how to name the right ones."""

from collections.abc import Callable, Iterable, Mapping

from clipfilter_wds.shards.found import LINK
from clipfilter_wds.shards.samples import IMAGE_EXTENSIONS, SampleLayout

_MAX_NAMED = 10
#: How the last part of a name ends that is probably a caption's, best first.
_CAPTION_NAMES = ("txt", "caption", "text", "captions", "cap", "alt", "description", "title")


def describe_lacking(
    num_lacking: int,
    num_samples: int,
    members: Mapping[str, int],
    layout: SampleLayout,
    write_options: Callable[[Mapping[str, str]], str],
    *,
    num_whole: int | None = None,
) -> str:
    """What samples lack, what their members are called, and the options that probably name the right ones.

    Args:
        num_lacking: How many samples lack an image or a caption.
        num_samples: Of how many.
        members: What their members are called, and how many are; see ``shards/found.py``.
        layout: Where image and caption were looked for.
        write_options: Values of the options ``image`` and ``caption`` -> how the user writes them.
        num_whole: How many samples all these members are of; None for ``num_samples``.
    """
    num_whole = num_samples if num_whole is None else num_whole
    named = {name: count for name, count in members.items() if not name.startswith(LINK)}
    fields = [name for name in named if ":" in name]
    extensions = {name: count for name, count in named.items() if name not in fields}
    lacking, options = [], {}
    if not _is_there(layout.image_extensions, named, num_whole):
        lacking.append("an image")
        options["image"] = _likely_image(named, layout) or "EXTENSION"
    if not _is_there(_caption_names(layout), named, num_whole):
        lacking.append("a caption")
        options["caption"] = _likely_caption(named, layout) or "EXTENSION"
    if len(extensions) > max(_MAX_NAMED, num_whole):
        cure = "A key ends at a name's first dot: replace the dots in the keys"
    elif any(LINK + name in members for name in (*layout.image_extensions, *layout.caption_extensions)):
        cure = "The others are links"
    elif options:
        cure = f"Name the right ones: {write_options(options)}"
    else:
        cure = "An image and its caption have the same name, folders included, up to the first dot"
    found = "Their score tables don't tell the names of members: score them again"
    if named:
        found = f"Their members' extensions are {list_counts(extensions)}"
        found += f"; fields {', '.join(fields[:_MAX_NAMED])}" if fields else ""
    lack = " and ".join(lacking) or "an image or a caption"
    return f"{num_lacking:,} of {num_samples:,} samples lack {lack}. {found}. {cure}"


def list_counts(counts: Mapping[str, int]) -> str:
    """Names with their counts, the most frequent first."""
    by_count = sorted(counts.items(), key=lambda item: -item[1])
    more = [f"and {len(by_count) - _MAX_NAMED} others"] if len(by_count) > _MAX_NAMED else []
    return ", ".join([*(f"{name or 'none'} ({count:,})" for name, count in by_count[:_MAX_NAMED]), *more])


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
