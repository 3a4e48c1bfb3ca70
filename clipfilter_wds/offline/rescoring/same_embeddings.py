"""Refuses embeddings that were made in another way than the scores that they are used with."""

from clipfilter_wds.offline.rescoring.sources import Sources
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint

#: Entries that decide what the scores are, or how exactly embeddings are computed, and not what is embedded. That
#: a trial does not get in is checked where tables are opened.
_NOT_OF_EMBEDDINGS = {"score", "derived", "precision", "resize_on_device", "limit"}
#: Entries that decide what is embedded of a caption, and nothing of the image.
_OF_CAPTIONS = {"caption", "max_text_bytes", "tokenizer", "max_tokens", "pads_to_max", "reduce"}
#: Entries that decide where a data set has its images, and which are left out.
_OF_DATA_SETS = {"image", "max_member_bytes", "max_pixels", "subset"}


def check_pairs(sources: Sources) -> None:
    """Refuse embeddings of images or captions other than the scored ones.

    Raises:
        ValueError: When another model made them, or they were made with other settings.
    """
    _check(sources, sources.fingerprints[0], "the embeddings", _but_subset(sources))


def check_images(sources: Sources) -> None:
    """Refuse embeddings of images other than the scored ones; the captions may be others.

    Raises:
        ValueError: When another model made them, or they were made with other settings.
    """
    _check(sources, sources.fingerprints[0], "the embeddings", _but_subset(sources) | _OF_CAPTIONS)


def check_target(target: Sources, sources: Sources) -> None:
    """Refuse a target whose embeddings can't be compared with those of the sources. It is another data set.

    Raises:
        ValueError: When another model made them, or the images were prepared in another way.
    """
    _check(target, sources.embeddings_of, "the target's embeddings", _OF_CAPTIONS | _OF_DATA_SETS)


def _but_subset(sources: Sources) -> set[str]:
    """Embeddings of all samples serve the scores of any subset."""
    return set() if "subset" in sources.embeddings_of else {"subset"}


def _check(found_in: Sources, expected: Fingerprint, what: str, left_out: set[str]) -> None:
    found = found_in.embeddings_of
    if found["weights"] != expected["weights"]:
        raise ValueError(
            f"{what} are of another model, {found['model']!r}; score with {expected['model']!r} and --embeddings there"
        )
    left_out = left_out | _NOT_OF_EMBEDDINGS
    check_fingerprint(
        {name: value for name, value in found.items() if name not in left_out},
        {name: value for name, value in expected.items() if name not in left_out},
        f"{str(found_in.embeddings_folder)!r}, where {what} are,",
        "score with the same settings and --embeddings there",
    )
