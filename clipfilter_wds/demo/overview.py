"""Draws a picture of some kept and some dropped pairs."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipfilter_wds.storage.publish import publish

_COLUMNS, _TILE, _TEXT, _GAP, _HEADING = 6, 168, 78, 14, 30
_KEPT_COLOUR, _DROPPED_COLOUR, _INK, _PAPER = "#1a7f37", "#b42318", "#1f2328", "#ffffff"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A scored pair: encoded image, caption, cosine, whether it was kept, and whether the caption is true."""

    image: bytes
    caption: str
    score: float
    kept: bool
    matched: bool


def write_overview(path: Path, pictures: Sequence[Picture], threshold: float) -> None:
    """Write a PNG with a row of kept and a row of dropped pairs, evenly spread from the best to the worst score."""
    kept, dropped = ([p for p in pictures if p.kept is is_kept] for is_kept in (True, False))
    row_height = _HEADING + _TILE + _TEXT + _GAP
    sheet = Image.new("RGB", (_COLUMNS * (_TILE + _GAP) + _GAP, 2 * row_height + _GAP), _PAPER)
    _draw_row(sheet, 0, f"kept: {len(kept)} pairs with a cosine of {threshold:g} or more", _KEPT_COLOUR, kept)
    _draw_row(sheet, row_height, f"dropped: {len(dropped)} pairs below it", _DROPPED_COLOUR, dropped)
    with publish(path) as file:
        sheet.save(file, format="PNG", optimize=True)


def _draw_row(sheet: Image.Image, top: int, heading: str, colour: str, pictures: Sequence[Picture]) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, top + _GAP), heading, fill=colour, font=ImageFont.load_default(16))
    for column, picture in enumerate(_spread(pictures)):
        left, below = _GAP + column * (_TILE + _GAP), top + _HEADING + _GAP + _TILE
        tile = Image.open(io.BytesIO(picture.image)).convert("RGB")
        tile.thumbnail((_TILE, _TILE))
        sheet.paste(tile, (left, below - tile.height))
        words = "\n".join(textwrap.wrap(picture.caption, width=23 if picture.caption.isupper() else 28)[:4])
        pen.text((left, below + 4), f"{picture.score:.2f}", fill=colour, font=ImageFont.load_default(13))
        pen.text((left, below + 20), words, fill=_INK, font=ImageFont.load_default(11), spacing=2)


def _spread(pictures: Sequence[Picture]) -> list[Picture]:
    ranked = sorted(pictures, key=lambda picture: -picture.score)
    step = max(1, (len(ranked) - 1) // max(1, _COLUMNS - 1))
    return ranked[::step][:_COLUMNS]
