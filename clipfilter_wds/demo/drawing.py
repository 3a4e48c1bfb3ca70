"""Draws scenes, each with the same pixels at every call."""

import cmath
import io
import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from clipfilter_wds.demo.scenes import Colour, Scene, Shape, Size

_RGB: dict[Colour, tuple[int, int, int]] = {
    "red": (214, 34, 36),
    "orange": (246, 136, 20),
    "yellow": (246, 222, 40),
    "green": (38, 152, 62),
    "blue": (36, 92, 214),
    "purple": (136, 46, 160),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
}
# Mid-tones, so that white and black shapes both stand out.
_BACKGROUND_RGB = [(140, 140, 140), (158, 146, 122), (122, 140, 156), (132, 150, 132)]
# Diameters as a fraction of the image's shorter side. The gap between the sizes leaves none in doubt.
_DIAMETER: dict[Size, tuple[float, float]] = {"small": (0.17, 0.20), "large": (0.27, 0.30)}
_MARGIN = 0.04
_SUPERSAMPLING = 3


class Mark(NamedTuple):
    """A drawn shape: centre and radius of the circle around it in pixels, and its turn in radians."""

    x: float
    y: float
    radius: float
    turn: float


def place(scene: Scene) -> tuple[tuple[Mark, ...], ...]:
    """The places of each group's shapes: apart from one another, within the central square of the image."""
    rng = random.Random(scene.seed)
    side = min(scene.width, scene.height)
    left, top = (scene.width - side) / 2, (scene.height - side) / 2
    groups = []
    for index, thing in enumerate(scene.things):
        columns, rows = _cells(scene, index)
        cells = rng.sample([(column, row) for column in columns for row in rows], thing.count)
        marks = []
        for (x0, x1), (y0, y1) in cells:
            radius = rng.uniform(*_DIAMETER[thing.size]) / 2
            x, y = rng.uniform(x0 + radius, x1 - radius), rng.uniform(y0 + radius, y1 - radius)
            turn = rng.uniform(-0.15, 0.15)
            marks.append(Mark(x=left + x * side, y=top + y * side, radius=radius * side, turn=turn))
        groups.append(tuple(marks))
    return tuple(groups)


def draw(scene: Scene) -> Image.Image:
    """The RGB image of a scene, ``scene.width`` by ``scene.height`` pixels."""
    noise = np.random.default_rng(scene.seed)
    image = Image.fromarray(_background(scene, noise))
    large = scene.width * _SUPERSAMPLING, scene.height * _SUPERSAMPLING
    for thing, marks in zip(scene.things, place(scene), strict=True):
        mask = Image.new("L", large)
        pen = ImageDraw.Draw(mask)
        for mark in marks:
            _draw_mark(pen, thing.shape, mark)
        shade = np.clip(np.array(_RGB[thing.colour]) + noise.integers(-12, 13, 3), 0, 255)
        image.paste((int(shade[0]), int(shade[1]), int(shade[2])), mask=mask.reduce(_SUPERSAMPLING))
    return image


def to_jpeg(image: Image.Image, *, quality: int = 90) -> bytes:
    """The image as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _split(start: float, stop: float, parts: int) -> list[tuple[float, float]]:
    edges = [start + (stop - start) * part / parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


def _cells(scene: Scene, index: int) -> tuple[Sequence[tuple[float, float]], Sequence[tuple[float, float]]]:
    """The columns and rows of the cells that a group may use, as fractions of the central square."""
    thirds = _split(_MARGIN, 1 - _MARGIN, 3)
    if scene.relation is None:
        return thirds, thirds
    near, far = _split(_MARGIN, 1 - _MARGIN, 2)
    half = near if (scene.relation in ("left of", "above")) == (index == 0) else far
    return ([half], thirds) if scene.relation in ("left of", "right of") else (thirds, [half])


def _background(scene: Scene, noise: np.random.Generator) -> NDArray[np.uint8]:
    """The texture as pixels, uint8 ``[height, width, 3]``, with noise and a soft gradient."""
    y, x = np.ogrid[: scene.height, : scene.width]
    period, phase = int(noise.integers(16, 27)), int(noise.integers(0, 16))
    pattern: NDArray[np.bool_]
    match scene.background:
        case "plain":
            pattern = np.zeros((1, 1), dtype=bool)
        case "striped":
            pattern = (x + (int(noise.integers(-1, 2))) * y + phase) % period < period // 2
        case "checkered":
            pattern = ((x + phase) // (period // 2) + (y + phase) // (period // 2)) % 2 == 0
        case "dotted":
            centre = period // 2
            pattern = ((x + phase) % period - centre) ** 2 + ((y + phase) % period - centre) ** 2 < (period // 4) ** 2
    slope = noise.integers(-16, 17, 2)
    light = slope[0] * (x / scene.width - 0.5) + slope[1] * (y / scene.height - 0.5) - 26 * pattern
    grain = noise.integers(-7, 8, (scene.height, scene.width), dtype=np.int16)
    base = np.array(_BACKGROUND_RGB[int(noise.integers(len(_BACKGROUND_RGB)))], dtype=np.int16)
    pixels: NDArray[np.uint8] = ((light.astype(np.int16) + grain)[:, :, None] + base).astype(np.uint8)
    return pixels


def _draw_mark(pen: ImageDraw.ImageDraw, shape: Shape, mark: Mark) -> None:
    centre, radius = _SUPERSAMPLING * complex(mark.x, mark.y), _SUPERSAMPLING * mark.radius
    turned = [centre + radius * cmath.exp(1j * mark.turn) * point for point in _OUTLINES[shape]]
    pen.polygon([(point.real, point.imag) for point in turned], fill=255)
    if shape == "ring":
        pen.circle((centre.real, centre.imag), 0.55 * radius, fill=0)


def _regular(corners: int, *, turn: float = 0.0) -> list[complex]:
    """A regular polygon in the unit circle, the first corner on top (y points down)."""
    return [-1j * cmath.exp(1j * math.tau * (corner + turn) / corners) for corner in range(corners)]


def _heart(angle: float) -> complex:
    y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
    return complex(0.95 * math.sin(angle) ** 3, -y / 17.5)


# Polygons within the unit circle of the complex plane.
_OUTLINES: dict[Shape, list[complex]] = {
    "circle": _regular(40),
    "square": _regular(4, turn=0.5),
    "triangle": _regular(3),
    "star": [point * (0.42 if index % 2 else 1.0) for index, point in enumerate(_regular(10))],
    "cross": [1j**quarter * point for quarter in range(4) for point in (-0.3 - 0.95j, 0.3 - 0.95j, 0.3 - 0.3j)],
    "heart": [_heart(math.tau * step / 40) for step in range(40)],
    "diamond": [complex(0.62 * point.real, point.imag) for point in _regular(4)],
    "ring": _regular(40),
}
