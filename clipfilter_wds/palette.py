"""The colours of all pictures that the project makes, light and dark; ``report/page.css`` has the same."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours as ``#rrggbb``.

    Attributes:
        paper: What everything lies on.
        sheet: A card or a chart on it.
        ink: Text.
        faint: Text and lines of less weight.
        line: Borders and grids.
        kept: Samples that are kept; of text, on a sheet.
        dropped: Samples that are dropped; of text, on a sheet.
    """

    paper: str
    sheet: str
    ink: str
    faint: str
    line: str
    kept: str
    dropped: str


LIGHT = Palette(
    paper="#f6f7f9",
    sheet="#ffffff",
    ink="#1c2128",
    faint="#59636e",
    line="#d5dae1",
    kept="#1f6feb",
    dropped="#b85c00",
)
DARK = Palette(
    paper="#0f1318",
    sheet="#181d24",
    ink="#e6eaf0",
    faint="#9aa5b1",
    line="#333b46",
    kept="#58a6ff",
    dropped="#f0a04b",
)
