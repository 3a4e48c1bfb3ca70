import colorsys
import re
from dataclasses import asdict
from pathlib import Path

import pytest

import clipfilter_wds.report
from clipfilter_wds.palette import DARK, LIGHT, Palette


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read(palette):
    """At the contrast that WCAG's level AA asks for."""
    assert min(contrast(text, palette.sheet) for text in (palette.kept, palette.dropped)) >= 4.5
    on = palette.paper, palette.sheet
    assert min(contrast(text, ground) for text in (palette.ink, palette.faint) for ground in on) >= 4.5


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_kept_and_dropped_differ_for_colour_blind_eyes(palette):
    """One is blue and the other orange, which red-green blindness leaves apart."""
    kept, dropped = (hue(colour) for colour in (palette.kept, palette.dropped))
    assert 200 < kept < 230
    assert 20 < dropped < 45


def hue(colour: str) -> float:
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return 360 * colorsys.rgb_to_hls(red, green, blue)[0]


def test_report_has_the_same_colours():
    css = (Path(clipfilter_wds.report.__file__).parent / "page.css").read_text()
    blocks = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)]
    light, dark = blocks[:2]
    assert [Palette(**{name: block[name] for name in asdict(LIGHT)}) for block in (light, dark)] == [LIGHT, DARK]
