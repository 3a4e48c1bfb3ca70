"""Draws a picture of some kept and some dropped pairs."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from clipfilter_wds.palette import LIGHT
from clipfilter_wds.storage.publish import publish

# All lengths are in pixels of the file, of which a sharp screen puts two where an ordinary one has one.
_COLUMNS, _TILE, _PADDING, _GAP, _HEADING = 6, 288, 20, 24, 76
_LINES, _LINE_HEIGHT, _RADIUS = 5, 30, 14
_CARD_WIDTH, _CARD_HEIGHT = _TILE, _TILE + _PADDING + 40 + _LINES * _LINE_HEIGHT + _PADDING
_SPACE = 7  # between words; the font's own is so narrow that "3 small" reads as one word

#: What tells the picture from others of its name.
_SIGNATURE = "Software", "clipfilter-wds demo"


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
    row_height = _HEADING + _CARD_HEIGHT
    size = _COLUMNS * (_CARD_WIDTH + _GAP) + _GAP, 2 * row_height + 2 * _GAP
    sheet = Image.new("RGB", size, LIGHT.sheet)
    _draw_row(sheet, 0, f"Kept: {len(kept)} pairs with a cosine of {threshold:g} or more", LIGHT.kept, kept)
    _draw_row(sheet, row_height + _GAP, f"Dropped: {len(dropped)} pairs below it", LIGHT.dropped, dropped)
    with publish(path) as file:
        sheet.save(file, format="PNG", pnginfo=_signed())


def is_overview(path: Path) -> bool:
    """Whether a file is a picture that :func:`write_overview` wrote."""
    try:
        with Image.open(path) as image:
            return image.info.get(_SIGNATURE[0]) == _SIGNATURE[1]
    except (OSError, Image.DecompressionBombError):  # it is no picture, or none that was drawn here
        return False


def _signed() -> PngInfo:
    signed = PngInfo()
    signed.add_text(*_SIGNATURE)
    return signed


def _draw_row(sheet: Image.Image, top: int, heading: str, colour: str, pictures: Sequence[Picture]) -> None:
    _write(sheet, (_GAP, top + _GAP), heading, colour, 34)
    for column, picture in enumerate(_spread(pictures)):
        _draw_card(sheet, _GAP + column * (_CARD_WIDTH + _GAP), top + _HEADING, colour, picture)


def _draw_card(sheet: Image.Image, left: int, top: int, colour: str, picture: Picture) -> None:
    """Draw an image, cut to the central square that the model sees, above its score and caption."""
    pen = ImageDraw.Draw(sheet)
    edge = (left, top, left + _CARD_WIDTH - 1, top + _CARD_HEIGHT - 1)
    image = Image.open(io.BytesIO(picture.image)).convert("RGB")
    tile = ImageOps.fit(image, (_TILE, _TILE), Image.Resampling.BICUBIC)
    corners = Image.new("L", tile.size)
    on_top = (True, True, False, False)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, _TILE - 1, _TILE), _RADIUS, 255, corners=on_top)
    sheet.paste(tile, (left, top), corners)
    pen.rounded_rectangle(edge, _RADIUS, outline=LIGHT.line, width=2)

    inner, below = left + _PADDING, top + _TILE + _PADDING
    _write(sheet, (inner, below), f"{picture.score:.2f}", colour, 28)
    for number, line in enumerate(_wrap(picture.caption)):
        _write(sheet, (inner, below + 40 + number * _LINE_HEIGHT), line, LIGHT.ink, 24)


def _wrap(caption: str) -> list[str]:
    """The caption in lines that fit the card; what exceeds the card's height is left out, and shown to be."""
    font, width = ImageFont.load_default(24), _CARD_WIDTH - 2 * _PADDING
    lines: list[str] = []
    for word in caption.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _width(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], "..."]


def _width(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    words = line.split()
    return sum(font.getlength(word) for word in words) + _SPACE * (len(words) - 1)


def _write(sheet: Image.Image, at: tuple[int, int], line: str, colour: str, size: int) -> None:
    font, pen, (x, y) = ImageFont.load_default(size), ImageDraw.Draw(sheet), at
    for word in line.split():
        pen.text((x, y), word, fill=colour, font=font)
        x += round(font.getlength(word)) + _SPACE


def _spread(pictures: Sequence[Picture]) -> list[Picture]:
    ranked = sorted(pictures, key=lambda picture: -picture.score)
    step = max(1, (len(ranked) - 1) // max(1, _COLUMNS - 1))
    return ranked[::step][:_COLUMNS]
