"""Writes the demo's shards: scenes, a known share with another scene's caption, and every kind of bad sample."""

import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from clipfilter_wds.demo.drawing import draw, to_jpeg
from clipfilter_wds.demo.scenes import Scene, describe, different_scene, random_scene
from clipfilter_wds.shards.tar_writer import TarWriter
from clipfilter_wds.storage.publish import publish
from clipfilter_wds.types import Member

NUM_SHARDS, SAMPLES_PER_SHARD, MISMATCHED_PERCENT = 4, 256, 30
_TORN_SHARD, _TORN_SHARE = 3, 0.95


def write_demo_shards(folder: Path, *, seed: int = 0) -> list[Path]:
    """Write shards laid out as img2dataset's; the ``json`` member says whether the caption is true."""
    return write_shards(folder, draw_demo_shards(seed=seed))


def write_shards(folder: Path, shards: Mapping[str, bytes]) -> list[Path]:
    """Write shards, by file name, and return their paths."""
    paths = [folder / name for name in shards]
    for path in paths:
        with publish(path) as file:
            file.write(shards[path.name])
    return paths


def draw_demo_shards(*, seed: int = 0) -> dict[str, bytes]:
    """By file name, the shards that :func:`write_demo_shards` writes: the same bytes at every call."""
    rng = random.Random(seed)
    shards = {}
    for shard in range(NUM_SHARDS):
        file = io.BytesIO()
        tar = TarWriter(file)
        for index in range(SAMPLES_PER_SHARD):
            for member in _sample(shard, index, rng):
                tar.add(member)
        tar.finish()
        if shard == _TORN_SHARD:
            file.truncate(int(file.tell() * _TORN_SHARE))
        shards[f"{shard:05d}.tar"] = file.getvalue()
    return shards


def _sample(shard: int, index: int, rng: random.Random) -> Iterator[Member]:
    key = f"{shard:05d}{index:04d}"
    oddity = _ODDITIES.get((shard, index))
    number = shard * SAMPLES_PER_SHARD + index
    # Of any 10 samples in a row exactly that share is mismatched.
    matched = oddity is not None or number * 7 % 10 >= MISMATCHED_PERCENT // 10
    scene = random_scene(rng, held_out=False)
    told = scene if matched else different_scene(scene, rng, held_out=False)
    members = {"jpg": to_jpeg(draw(scene)), "txt": describe(told, rng).encode()}
    if oddity is not None:
        members = oddity(members, rng)
    members["json"] = json.dumps({"key": key, "matched": matched}).encode()
    for extension, data in members.items():
        yield Member(name=f"{key}.{extension}", extension=extension, data=data)


Members = dict[str, bytes]


def _blank_caption(members: Members, rng: random.Random) -> Members:
    return {**members, "txt": b" \n"}


def _missing_caption(members: Members, rng: random.Random) -> Members:
    return {"jpg": members["jpg"]}


def _truncated_jpeg(members: Members, rng: random.Random) -> Members:
    return {**members, "jpg": members["jpg"][: len(members["jpg"]) // 2]}


def _text_named_jpg(members: Members, rng: random.Random) -> Members:
    return {**members, "jpg": b"<html>404 Not Found</html>"}


def _cmyk_jpeg(members: Members, rng: random.Random) -> Members:
    return {**members, "jpg": to_jpeg(Image.open(io.BytesIO(members["jpg"])).convert("CMYK"))}


def _grey_16_bit_png(members: Members, rng: random.Random) -> Members:
    scene = _grey_scene(rng)
    grey = np.asarray(draw(scene).convert("L")).astype(np.uint16) * 257
    png = io.BytesIO()
    Image.fromarray(grey).save(png, format="PNG")
    return {"png": png.getvalue(), "txt": describe(scene, rng).encode()}


def _grey_scene(rng: random.Random) -> Scene:
    """A scene whose caption is also true of its greyscale image."""
    while True:
        scene = random_scene(rng, held_out=False)
        if all(thing.colour in ("black", "white") for thing in scene.things):
            return scene


_ODDITIES: dict[tuple[int, int], Callable[[Members, random.Random], Members]] = {
    (0, 10): _blank_caption,
    (0, 20): _missing_caption,
    (1, 30): _truncated_jpeg,
    (1, 40): _text_named_jpg,
    (2, 50): _cmyk_jpeg,
    (2, 60): _grey_16_bit_png,
}
