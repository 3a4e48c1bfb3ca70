"""Invents scenes and captions: the world that the bundled tiny CLIP knows.

A scene is one or two groups of shapes on a textured background. A quarter of the colour-and-shape pairs are held out:
the tiny CLIP is trained without them and measured on scenes that hold nothing else. All randomness comes in as a
``random.Random``.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

Shape = Literal["circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
Size = Literal["small", "large"]
Texture = Literal["plain", "striped", "checkered", "dotted"]
Relation = Literal["left of", "right of", "above", "below"]
Attribute = Literal["shape", "colour", "size", "count", "relation", "background"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)
TEXTURES: tuple[Texture, ...] = get_args(Texture)
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)
OPPOSITE: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# The most shapes in a group: in the only group, and in each of two.
MAX_COUNT = {1: 4, 2: 3}

# What a caption may say instead of an attribute's name.
_SYNONYMS: dict[str, list[str]] = {
    "circle": ["disc"],
    "cross": ["plus sign"],
    "diamond": ["rhombus"],
    "ring": ["hoop"],
    "red": ["scarlet"],
    "yellow": ["golden"],
    "green": ["emerald"],
    "blue": ["azure"],
    "purple": ["violet"],
    "small": ["little", "tiny"],
    "large": ["big", "huge"],
    "left of": ["to the left of", "on the left side of"],
    "right of": ["to the right of", "on the right side of"],
    "above": ["over", "higher than"],
    "below": ["under", "lower than"],
}
_COUNT_WORDS = {1: ["a", "one", "a single"], 2: ["two", "2", "a pair of"], 3: ["three", "3"], 4: ["four", "4"]}
_BACKGROUND_WORDS: dict[Texture, list[str]] = {
    "plain": ["on a plain background", "against a plain backdrop", "on an empty surface"],
    "striped": ["on a striped background", "against stripes", "in front of a striped wall"],
    "checkered": ["on a checkered background", "on a chessboard pattern", "against a checkered wall"],
    "dotted": ["on a dotted background", "against polka dots", "in front of a dotted wall"],
}
_OPENINGS = ["a picture of", "a drawing of", "an image showing", "a photo of", "here we see", "you can see"]
_ASIDES = ["drawn by a computer", "in flat colours", "simple clip art", "with soft edges"]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A group of equal shapes, such as two small red circles."""

    shape: Shape
    colour: Colour
    size: Size
    count: int

    @property
    def held_out(self) -> bool:
        """Whether training never shows this shape in this colour: two of the eight shapes for every colour."""
        return (COLOURS.index(self.colour) - SHAPES.index(self.shape)) % len(SHAPES) in (0, 3)

    @property
    def core(self) -> tuple[int, Colour, Shape]:
        """What every caption says of the group."""
        return self.count, self.colour, self.shape


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that a drawing depends on; equal scenes have equal pixels.

    Attributes:
        things: One group, or two of different colour-and-shape pairs.
        relation: Where the first of two groups is, seen from the second; None for one group.
        background: The texture behind the shapes.
        width: Width of the image in pixels.
        height: Its height.
        seed: Decides what no caption mentions: exact places and shades, and the background's noise.

    Raises:
        ValueError: When it could not be drawn or described.
    """

    things: tuple[Thing, ...]
    relation: Relation | None
    background: Texture
    width: int
    height: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"things holds {len(self.things)} groups; a scene has one or two")
        if (self.relation is None) != (len(self.things) == 1):
            raise ValueError(f"relation is {self.relation!r} for {len(self.things)} group(s); it belongs to two groups")
        limit = MAX_COUNT[len(self.things)]
        if any(not 1 <= thing.count <= limit for thing in self.things):
            raise ValueError(f"counts are {[thing.count for thing in self.things]}; each must lie in 1..{limit}")
        if len({(thing.colour, thing.shape) for thing in self.things}) < len(self.things):
            raise ValueError("both things have the same colour and shape; their caption would be ambiguous")


def random_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """A scene whose groups all have held-out colour-and-shape pairs, or all have trained ones."""
    num_things = rng.choice((1, 2))
    pairs = rng.sample(_pairs(held_out), num_things)
    things = tuple(
        Thing(shape=shape, colour=colour, size=rng.choice(SIZES), count=rng.randint(1, MAX_COUNT[num_things]))
        for colour, shape in pairs
    )
    width, height = rng.choice(((192, 160), (160, 192), (208, 144), (176, 176), (144, 176), (224, 160)))
    return Scene(
        things=things,
        relation=rng.choice(tuple(OPPOSITE)) if num_things == 2 else None,
        background=rng.choice(TEXTURES),
        width=width,
        height=height,
        seed=rng.getrandbits(32),
    )


def different_scene(scene: Scene, rng: random.Random, *, held_out: bool) -> Scene:
    """A random scene, no caption of which is true of ``scene``: a source of mismatched captions."""
    while True:
        other = random_scene(rng, held_out=held_out)
        if contradicts(other, scene):
            return other


def contradicts(described: Scene, shown: Scene) -> bool:
    """Whether every caption of ``described`` is false of the image of ``shown``.

    Captions may leave out sizes, the relation and the background, but always name count, colour and shape. So all are
    false when ``shown`` lacks one of the groups; a group with another count is another group.
    """
    return not {thing.core for thing in described.things} <= {thing.core for thing in shown.things}


def change_one(scene: Scene, rng: random.Random) -> tuple[Scene, Attribute]:
    """The scene with exactly one attribute changed, and which one: a hard negative.

    Changing the colour or shape of a held-out pair gives a held-out pair, and of a trained pair a trained one. Caption
    the result with ``describe(changed, rng, always=(attribute,))``, or the change may go unmentioned.
    """
    changes = {attribute: _changes(scene, attribute) for attribute in ATTRIBUTES}
    attribute = rng.choice([attribute for attribute in ATTRIBUTES if changes[attribute]])
    return rng.choice(changes[attribute]), attribute


def describe(scene: Scene, rng: random.Random, *, always: Collection[Attribute] = ()) -> str:
    """A true caption of 4 to 30 words, in a random wording and case.

    Always names count, colour and shape of every group; sizes, the relation and the background now and then, and
    whenever they are in ``always``.
    """
    with_size = "size" in always or rng.random() < 0.6
    groups = [_phrase(thing, rng, with_size=with_size) for thing in scene.things]
    text = groups[0]
    if scene.relation is not None:
        first, second = groups
        if "relation" in always or rng.random() < 0.8:
            relation = scene.relation
            if rng.random() < 0.5:
                first, second, relation = second, first, OPPOSITE[relation]
            text = f"{first} {_word(relation, rng)} {second}"
        else:
            text = f"{first} and {second}"
    background = "background" in always or rng.random() < 0.5
    if background:
        text = f"{text} {rng.choice(_BACKGROUND_WORDS[scene.background])}"
    if not background or rng.random() < 0.3:
        text = f"{rng.choice(_OPENINGS)} {text}"
    if rng.random() < 0.15:
        text = f"{text}, {rng.choice(_ASIDES)}"
    return rng.choices((text, f"{text[0].upper()}{text[1:]}.", text.upper()), weights=(6, 3, 1))[0]


@cache
def _pairs(held_out: bool) -> tuple[tuple[Colour, Shape], ...]:
    things = (Thing(shape=shape, colour=colour, size="small", count=1) for colour in COLOURS for shape in SHAPES)
    return tuple((thing.colour, thing.shape) for thing in things if thing.held_out == held_out)


def _changes(scene: Scene, attribute: Attribute) -> list[Scene]:
    """Every scene that differs from ``scene`` in this attribute only, and is held out just when ``scene`` is."""
    if attribute == "background":
        return [replace(scene, background=texture) for texture in TEXTURES if texture != scene.background]
    if attribute == "relation":
        return [replace(scene, relation=OPPOSITE[scene.relation])] if scene.relation else []
    values: dict[str, Sequence[Any]] = {
        "shape": SHAPES,
        "colour": COLOURS,
        "size": SIZES,
        "count": range(1, MAX_COUNT[len(scene.things)] + 1),
    }
    changes = []
    for index, thing in enumerate(scene.things):
        rest = {(other.colour, other.shape) for other in scene.things if other is not thing}
        for value in values[attribute]:
            changed = replace(thing, **{attribute: value})
            if changed == thing or changed.held_out != thing.held_out or (changed.colour, changed.shape) in rest:
                continue
            changes.append(replace(scene, things=(*scene.things[:index], changed, *scene.things[index + 1 :])))
    return changes


def _word(value: str, rng: random.Random) -> str:
    return rng.choice([value, *_SYNONYMS.get(value, [])])


def _phrase(thing: Thing, rng: random.Random, *, with_size: bool) -> str:
    adjectives = f"{_word(thing.size, rng)} {_word(thing.colour, rng)}" if with_size else _word(thing.colour, rng)
    count, noun = rng.choice(_COUNT_WORDS[thing.count]), _word(thing.shape, rng)
    if count == "a" and adjectives[0] in "aeiou":
        count = "an"
    if thing.count > 1:
        noun += "es" if noun.endswith("s") else "s"
    return f"{count} {adjectives} {noun}"
