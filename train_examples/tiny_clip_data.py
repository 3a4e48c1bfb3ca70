"""What the bundled tiny CLIP learns from: scenes, each with a copy of which one attribute was changed."""

import io
import random
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor, CLIPProcessor

from clipfilter_wds.demo.drawing import draw, to_jpeg
from clipfilter_wds.demo.scenes import COLOURS, SHAPES, Attribute, Scene, Thing, change_one, describe, random_scene


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A scene and the same scene with one attribute changed: each one's caption is false of the other."""

    scene: Scene
    changed: Scene
    attribute: Attribute

    def captions(self, rng: random.Random) -> list[str]:
        return [describe(scene, rng, always=(self.attribute,)) for scene in (self.scene, self.changed)]

    def images(self, rng: random.Random) -> list[Image.Image]:
        """Return both as the demo's shards would hold them."""
        files = [to_jpeg(draw(scene), quality=rng.randint(80, 95)) for scene in (self.scene, self.changed)]
        return [Image.open(io.BytesIO(file)) for file in files]


def random_pairs(rng: random.Random, count: int, *, held_out: bool) -> list[Pair]:
    pairs = []
    for _ in range(count):
        scene = random_scene(rng, held_out=held_out)
        changed, attribute = change_one(scene, rng)
        # Another seed, so that the two images differ in all that no caption mentions, too.
        changed = replace(changed, seed=rng.getrandbits(32))
        pairs.append(Pair(scene=scene, changed=changed, attribute=attribute))
    return pairs


class DrawnPairs(Dataset[Tensor]):
    """Uint8 views [2, 3, S, S] of each pair, by the image processor that is saved with the model."""

    def __init__(self, pairs: list[Pair], image_processor: CLIPImageProcessor) -> None:
        self.pairs = pairs
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor:
        images = self.pairs[index].images(random.Random(index))
        view = self.image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
        return view["pixel_values"]


def draw_all(pairs: list[Pair], image_processor: CLIPImageProcessor) -> Tensor:
    """Return uint8 views [N, 2, 3, S, S], drawn once: anew in every epoch would take half as long again."""
    loader = DataLoader(DrawnPairs(pairs, image_processor), batch_size=64, num_workers=2)
    return torch.cat(list(loader))


def core_number(thing: Thing) -> int:
    return (thing.count * len(COLOURS) + COLOURS.index(thing.colour)) * len(SHAPES) + SHAPES.index(thing.shape)


class CaptionedPairs(Dataset[tuple[Pair, Tensor]]):
    """Drawn pairs, whose captions are worded anew whenever a batch is collated."""

    def __init__(self, pairs: list[Pair], processor: CLIPProcessor, seed: int) -> None:
        self.pairs = pairs
        self.views = draw_all(pairs, processor.image_processor)
        self.processor = processor
        self.rng = random.Random(seed)
        self.mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Pair, Tensor]:
        return self.pairs[index], self.views[index]

    def collate(self, items: list[tuple[Pair, Tensor]]) -> dict[str, Tensor]:
        """Return a batch of 2N samples, in which 2i and 2i + 1 differ in one attribute."""
        scenes = [scene for pair, _ in items for scene in (pair.scene, pair.changed)]
        captions = [caption for pair, _ in items for caption in pair.captions(self.rng)]
        text = self.processor.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        views = torch.cat([view for _, view in items])
        cores = [[core_number(thing) for thing in (scene.things * 2)[:2]] for scene in scenes]
        return {
            "pixel_values": (views / 255 - self.mean) / self.std,
            "input_ids": text["input_ids"],
            "cores": torch.tensor(cores),
        }


def false_pairs(cores: Tensor) -> Tensor:
    """Return a bool matrix [image, caption]: where the caption is known to be false of the image.

    A caption that names a subset of an image's groups may be true of it by chance, except within a pair, whose
    captions always name what was changed.
    """
    named = (cores[:, None, None, :] == cores[None, :, :, None]).any(-1).all(-1)
    index = torch.arange(len(cores))
    partners = index[:, None] == (index ^ 1)[None, :]
    return ~named | partners
