import dataclasses
import io
import random
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image, ImageChops

from clipfilter_wds.demo.drawing import draw, place, to_jpeg
from clipfilter_wds.demo.scenes import (
    ATTRIBUTES,
    COLOURS,
    OPPOSITE,
    SHAPES,
    Scene,
    Thing,
    change_one,
    contradicts,
    describe,
    different_scene,
    random_scene,
)

seeds = st.integers(0, 2**64)
rngs = seeds.map(random.Random)
scenes = st.builds(lambda seed, held_out: random_scene(random.Random(seed), held_out=held_out), seeds, st.booleans())


@given(seeds, st.booleans())
def test_equal_seeds_give_equal_scenes_and_captions(seed, held_out):
    def make():
        rng = random.Random(seed)
        scene = random_scene(rng, held_out=held_out)
        return scene, describe(scene, rng), change_one(scene, rng)

    assert make() == make()


@settings(max_examples=20)
@given(scenes)
def test_a_scene_is_always_drawn_to_the_same_pixels(scene):
    image = draw(scene)
    assert image.mode == "RGB"
    assert image.size == (scene.width, scene.height)
    assert image.tobytes() == draw(scene).tobytes()


@given(rngs, st.booleans())
def test_held_out_and_trained_scenes_share_no_colour_and_shape(rng, held_out):
    scene = random_scene(rng, held_out=held_out)
    for one in (scene, different_scene(scene, rng, held_out=held_out), change_one(scene, rng)[0]):
        assert all(thing.held_out == held_out for thing in one.things)


def test_a_quarter_of_the_pairs_is_held_out_and_no_colour_or_shape_is_new():
    things = [Thing(shape=shape, colour=colour, size="small", count=1) for shape in SHAPES for colour in COLOURS]
    held_out = [thing for thing in things if thing.held_out]
    trained = [thing for thing in things if not thing.held_out]
    assert len(held_out) == len(things) / 4
    assert {thing.colour for thing in held_out} == {thing.colour for thing in trained} == set(COLOURS)
    assert {thing.shape for thing in held_out} == {thing.shape for thing in trained} == set(SHAPES)


@given(scenes)
def test_shapes_lie_in_the_central_square_apart_from_one_another(scene):
    side = min(scene.width, scene.height)
    left, top = (scene.width - side) / 2, (scene.height - side) / 2
    groups = place(scene)
    assert [len(marks) for marks in groups] == [thing.count for thing in scene.things]
    marks = [mark for group in groups for mark in group]
    for mark in marks:
        assert left <= mark.x - mark.radius
        assert mark.x + mark.radius <= left + side
        assert top <= mark.y - mark.radius
        assert mark.y + mark.radius <= top + side
    for index, one in enumerate(marks):
        for other in marks[:index]:
            apart = max(abs(one.x - other.x), abs(one.y - other.y))
            assert apart >= one.radius + other.radius - 1e-6


@given(scenes)
def test_the_relation_is_true_of_every_shape(scene):
    if scene.relation is None:
        return
    first, second = place(scene)
    for one in first:
        for other in second:
            truth = {
                "left of": one.x + one.radius <= other.x - other.radius,
                "right of": one.x - one.radius >= other.x + other.radius,
                "above": one.y + one.radius <= other.y - other.radius,
                "below": one.y - one.radius >= other.y + other.radius,
            }
            assert truth[scene.relation]


@settings(max_examples=20)
@given(scenes)
def test_nothing_is_drawn_outside_the_marks(scene):
    """Two scenes that differ in a group's colour differ in pixels near that group's marks only."""
    thing = scene.things[0]
    changed = dataclasses.replace(thing, colour=next(c for c in COLOURS if c not in {t.colour for t in scene.things}))
    other = dataclasses.replace(scene, things=(changed, *scene.things[1:]))
    difference = np.array(ImageChops.difference(draw(scene), draw(other))).any(axis=2)
    y, x = np.ogrid[: scene.height, : scene.width]
    near = np.zeros_like(difference)
    for mark in place(scene)[0]:
        near |= (x + 0.5 - mark.x) ** 2 + (y + 0.5 - mark.y) ** 2 <= (mark.radius + 1.5) ** 2
    assert difference.any()
    assert not difference[~near].any()


WORDS = {
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus sign"),
    "diamond": ("diamond", "rhombus"),
    "ring": ("ring", "hoop"),
    "red": ("red", "scarlet"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    1: ("a ", "an ", "one "),
    2: ("two ", "2 ", "a pair of "),
    3: ("three ", "3 "),
    4: ("four ", "4 "),
    "plain": ("plain", "empty"),
    "striped": ("stripe",),
    "checkered": ("checkered", "chessboard"),
    "dotted": ("dot",),
    "left of": ("left ",),
    "right of": ("right ",),
    "above": ("above", "over", "higher"),
    "below": ("below", "under", "lower"),
}


def mentions(caption: str, value: str | int) -> bool:
    return any(re.search(rf"\b{word}", caption.lower()) for word in WORDS.get(value, (value,)))


@given(scenes, rngs)
def test_a_caption_names_the_count_colour_and_shape_of_every_group(scene, rng):
    caption = describe(scene, rng)
    assert 4 <= len(caption.split()) <= 30
    for thing in scene.things:
        assert mentions(caption, thing.count)
        assert mentions(caption, thing.colour)
        assert mentions(caption, thing.shape)
    for colour in set(COLOURS) - {thing.colour for thing in scene.things}:
        assert not mentions(caption, colour)


@given(scenes, rngs)
def test_a_caption_names_what_it_is_asked_to(scene, rng):
    caption = describe(scene, rng, always=ATTRIBUTES)
    assert mentions(caption, scene.background)
    assert all(mentions(caption, thing.size) for thing in scene.things)
    if scene.relation is not None:
        assert mentions(caption, scene.relation) != mentions(caption, OPPOSITE[scene.relation])


@given(scenes)
def test_captions_vary(scene):
    rng = random.Random(0)
    assert len({describe(scene, rng) for _ in range(30)}) > 15


@given(scenes, rngs, st.booleans())
def test_a_different_scene_lacks_what_its_captions_name(scene, rng, held_out):
    other = different_scene(scene, rng, held_out=held_out)
    assert contradicts(other, scene)
    shown = {(thing.count, thing.colour, thing.shape) for thing in scene.things}
    assert any((thing.count, thing.colour, thing.shape) not in shown for thing in other.things)


@given(scenes)
def test_a_scene_does_not_contradict_itself_nor_a_part_of_it(scene):
    part = dataclasses.replace(scene, things=scene.things[:1], relation=None)
    assert not contradicts(scene, scene)
    assert not contradicts(part, scene)
    assert contradicts(scene, part) == (len(scene.things) == 2)


@given(scenes, rngs)
def test_change_one_changes_the_attribute_it_names_and_nothing_else(scene, rng):
    changed, attribute = change_one(scene, rng)
    different = {
        field.name
        for field in dataclasses.fields(Scene)
        if field.name != "things" and getattr(scene, field.name) != getattr(changed, field.name)
    } | {
        field.name
        for before, after in zip(scene.things, changed.things, strict=True)
        for field in dataclasses.fields(Thing)
        if getattr(before, field.name) != getattr(after, field.name)
    }
    assert different == {attribute}
    assert sum(before != after for before, after in zip(scene.things, changed.things, strict=True)) <= 1
    assert contradicts(changed, scene) == (attribute in {"shape", "colour", "count"})


@settings(max_examples=20)
@given(scenes)
def test_every_jpeg_decodes(scene):
    with Image.open(io.BytesIO(to_jpeg(draw(scene)))) as image:
        image.load()
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (scene.width, scene.height))


def test_impossible_scenes_are_refused():
    scene = random_scene(random.Random(0), held_out=False)
    star = Thing(shape="star", colour="red", size="small", count=1)
    with pytest.raises(ValueError, match="relation is None for 2 group"):
        dataclasses.replace(scene, things=(star, dataclasses.replace(star, colour="blue")), relation=None)
    with pytest.raises(ValueError, match="the same colour and shape"):
        dataclasses.replace(scene, things=(star, dataclasses.replace(star, size="large")), relation="above")
    with pytest.raises(ValueError, match=r"must lie in 1\.\.4"):
        dataclasses.replace(scene, things=(dataclasses.replace(star, count=5),), relation=None)
    with pytest.raises(ValueError, match="things holds 0 groups"):
        dataclasses.replace(scene, things=(), relation=None)
