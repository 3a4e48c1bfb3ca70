"""Makes the gallery's cards of picked samples, with caption and thumbnail where the shards are at hand."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from PIL import Image

from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.preprocess.members import first_image, read_captions
from clipfilter_wds.report.findings import ScoredRun
from clipfilter_wds.report.picks import Pick
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.identity import OtherShardError, check_identity
from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.types import DropReason, Sample, ShardError, UnusableError

_SIDE = 240
_QUALITIES = (78, 60, 40, 20)
_MAX_CAPTION_CHARS = 600

#: No thumbnail is larger, so that 200 of them fit into a page of 8 MB.
MAX_THUMBNAIL_BYTES = 18_000

#: Reasons of samples whose image may be decoded here: none that crashed a decoder is among them.
_HAVE_A_PICTURE = (
    None,
    DropReason.MISSING_CAPTION,
    DropReason.BLANK_CAPTION,
    DropReason.NOT_FINITE,
    DropReason.NEAR_DUPLICATE,
)

# Control characters are shown as the symbols that Unicode has for them.
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the gallery shows of a sample.

    Attributes:
        key: The sample's key, as it can be shown.
        shard: Its shard's name.
        score: Raw, of the table's kind.
        num_tokens: Length of the caption in tokens.
        truncated: Whether the caption is longer than the text tower takes.
        width: Width of the image as stored, in pixels.
        height: Its height.
        listable: Whether ``key`` is the key as it is, so that a list of keys can hold it.
        reason: Why the sample could not be scored, None when it was.
        caption: The beginning of the caption, None when no shard was there to read it from.
        image: Thumbnail as a ``data:`` URL, or None.
        problem: Why there is no image or caption.
    """

    key: str
    shard: str
    score: float
    num_tokens: int
    truncated: bool
    width: int
    height: int
    listable: bool
    reason: str | None = None
    caption: str | None = None
    image: str | None = None
    problem: str | None = None


def cards_by_pick(picks: Sequence[Pick], run: ScoredRun, urls: Sequence[str]) -> dict[Pick, Card]:
    """Read the picked samples, each shard only as far as needed.

    Args:
        picks: The samples.
        run: The tables that they were picked from.
        urls: Shards to read captions and pictures from; they may be those of some tables only, or none.
    """
    shards = {run.table.path(url): url for url in urls}
    cards: dict[Pick, Card] = {}
    for table, group in groupby(sorted(picks, key=lambda pick: (pick.table, pick.index)), key=lambda pick: pick.table):
        path = run.table.paths[table]
        scores, name = ShardScores.read(path), run.name(path)
        of_table = {pick.index: pick for pick in group}
        bare = {index: _bare_card(pick, name, scores) for index, pick in of_table.items()}
        if (url := shards.get(path)) is not None:
            bare = _illustrate(bare, url, path, scores.metadata)
        elif urls:
            bare = _with_problem(bare, "its shard is not among those given")
        cards |= {of_table[index]: card for index, card in bare.items()}
    return cards


def _bare_card(pick: Pick, name: str, scores: ShardScores) -> Card:
    row = scores.table.slice(pick.index, 1).to_pylist()[0]
    return Card(
        key=_printable(row["key"]),
        shard=name,
        score=pick.score,
        num_tokens=row["num_tokens"],
        truncated=row["truncated"],
        width=row["width"],
        height=row["height"],
        listable=_is_listable(row["key"]),
        reason=row["reason"],
    )


def _illustrate(cards: Mapping[int, Card], url: str, table: Path, metadata: ScoreMetadata) -> dict[int, Card]:
    """The cards with captions and thumbnails, by index in the shard."""
    fingerprint = metadata.fingerprint
    done = _with_problem(cards, "its shard has no such sample any more")
    try:
        # The size has to do: to tell a copy by its headers, the whole shard would be read.
        check_identity(url, metadata.identity, table, is_read_next=True)
        for sample in _read(url, cards, SampleLayout.from_fingerprint(fingerprint)):
            card = cards[sample.index]
            if _printable(sample.key) == card.key:
                done[sample.index] = _illustrated(card, sample, fingerprint)
    except OtherShardError:
        done = _with_problem(cards, "its shard is not the one that was scored")
    except ShardError as error:
        unread = {index: card for index, card in done.items() if card.caption is None}
        done |= _with_problem(unread, f"its shard can't be read: {error}")
    return done


def _read(url: str, wanted: Mapping[int, Card], layout: SampleLayout) -> Iterator[Sample]:
    last = max(wanted)
    with open_shard(url) as shard:
        for sample in read_samples(shard, layout, wanted=lambda index: index in wanted, pair_only=True):
            if isinstance(sample, Sample):
                yield sample
                if sample.index == last:
                    return


def _illustrated(card: Card, sample: Sample, fingerprint: Fingerprint) -> Card:
    members = {member.extension: member.data for member in sample.members}
    caption = image = problem = None
    layout = SampleLayout.from_fingerprint(fingerprint)
    try:
        caption = _printable(" | ".join(read_captions(members, layout)))
    except UnusableError as unusable:
        problem = f"it can't be shown: {unusable.reason}"
    if card.reason not in _HAVE_A_PICTURE:
        return replace(card, caption=caption, problem="it could not be read when it was scored")
    try:
        image = thumbnail(first_image(members, layout), max_pixels=fingerprint["max_pixels"])
    except UnusableError as unusable:
        problem = f"it can't be shown: {unusable.reason}"
    return replace(card, caption=caption, image=image, problem=problem)


def thumbnail(encoded: bytes, *, max_pixels: int) -> str:
    """A JPEG of an image as a ``data:`` URL, whose longer side has at most 240 pixels.

    Raises:
        UnusableError: ``unreadable_image`` or ``image_too_large``.
    """
    image = ImageView(resize=_SIDE, crop=(_SIDE, _SIDE), max_pixels=max_pixels).decode(encoded).image
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    for quality in _QUALITIES:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=quality, optimize=True)
        if file.tell() <= MAX_THUMBNAIL_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _with_problem(cards: Mapping[int, Card], problem: str) -> dict[int, Card]:
    return {index: replace(card, problem=problem) for index, card in cards.items()}


def _printable(text: str) -> str:
    shown = text if len(text) <= _MAX_CAPTION_CHARS else text[:_MAX_CAPTION_CHARS] + " …"
    return shown.translate(_CONTROLS)


def _is_listable(key: str) -> bool:
    return _printable(key) == key == key.strip() and len(key.splitlines()) == 1
