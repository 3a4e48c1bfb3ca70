"""How well a CLIP finds a held-out scene's caption among others, and the scene of a caption."""

import random
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from clipfilter_wds.demo.drawing import draw
from clipfilter_wds.demo.scenes import Scene, contradicts, describe, random_scene
from clipfilter_wds.preprocess.clip import ClipPreprocess
from clipfilter_wds.preprocess.image import RgbImage


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of the images whose own caption scores highest among a gallery's, and the reverse."""

    image_to_text: float
    text_to_image: float


@dataclass(frozen=True, kw_only=True)
class Galleries:
    """Scenes in groups of one size; within a group, no caption is true of another's image.

    Attributes:
        pixel_values: uint8 ``[G, N, 3, S, S]``.
        input_ids: int64 ``[G, N, L]``.
    """

    pixel_values: Tensor
    input_ids: Tensor

    @classmethod
    def draw(cls, preprocess: ClipPreprocess, *, seed: int, num_galleries: int, size: int) -> Self:
        rng = random.Random(seed)
        scenes = [scene for _ in range(num_galleries) for scene in _distinct_scenes(rng, size)]
        images = [RgbImage.of(draw(scene)) for scene in scenes]
        views, tokens = preprocess.collate(
            [preprocess.prepare(image, [describe(scene, rng)]) for image, scene in zip(images, scenes, strict=True)]
        )
        shape = (num_galleries, size)
        return cls(pixel_values=views.unflatten(0, shape), input_ids=tokens.input_ids.unflatten(0, shape))

    @property
    def size(self) -> int:
        return self.pixel_values.shape[1]

    def recall(self, images: Tensor, texts: Tensor) -> Recall:
        """Recall at 1 of normalised embeddings ``[G * N, D]``."""
        shape = self.pixel_values.shape[:2]
        cosine = images.unflatten(0, shape) @ texts.unflatten(0, shape).mT
        own = torch.arange(self.size)
        return Recall(
            image_to_text=_share(cosine.argmax(2) == own),
            text_to_image=_share(cosine.argmax(1) == own),
        )


def _share(found: Tensor) -> float:
    return int(found.sum()) / found.numel()


def _distinct_scenes(rng: random.Random, count: int) -> list[Scene]:
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, held_out=False)
        if all(contradicts(scene, other) and contradicts(other, scene) for other in scenes):
            scenes.append(scene)
    return scenes
