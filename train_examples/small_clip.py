"""What the training examples share: a small CLIP, the views of a pair that it learns from, and shards to try it on."""

import math
import re
import zlib
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torchvision.transforms.v2.functional import pil_to_tensor

from clipfilter_wds.demo.shards import write_demo_shards

IMAGE_SIZE, NUM_TOKENS, NUM_WORDS = 64, 32, 8192
PADDING, START = 0, 1


def image_view(image: Image.Image) -> Tensor:
    """An RGB image -> uint8 [3, S, S]; runs in the loader's workers."""
    return pil_to_tensor(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def text_view(caption: str) -> Tensor:
    """A caption -> int64 [NUM_TOKENS]: each word's hash, so that no vocabulary is needed."""
    words = re.findall(r"\w+", caption.lower())[: NUM_TOKENS - 1]
    ids = [START, *(START + 1 + zlib.crc32(word.encode()) % (NUM_WORDS - START - 1) for word in words)]
    return torch.tensor(ids + [PADDING] * (NUM_TOKENS - len(ids)))


class SmallClip(nn.Module):
    """Two towers of under two million parameters. In a real run, your own model stands here."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = [3, width // 4, width // 2, width, width]
        self.image_tower = nn.Sequential(
            *(_halve(given, made) for given, made in pairwise(sizes)),
            nn.Flatten(),
            nn.Linear(width * (IMAGE_SIZE // 16) ** 2, width),
        )
        self.words = nn.Embedding(NUM_WORDS, width, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.randn(NUM_TOKENS, width) / 10)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True)
        self.text_tower = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """CLIP's contrastive loss of uint8 images [N, 3, S, S] and token ids [N, NUM_TOKENS]."""
        images = normalize(self.image_tower(image / 127.5 - 1), dim=-1)
        tokens = self.text_tower(self.words(text) + self.positions, src_key_padding_mask=text == PADDING)
        texts = normalize(tokens[:, 0], dim=-1)
        logits = self.logit_scale.exp() * images @ texts.T
        target = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def _halve(given: int, made: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(given, made, 3, stride=2, padding=1), nn.GroupNorm(8, made), nn.GELU())


def demo_shards(folder: Path = Path("demo_shards")) -> str:
    """Shards of drawn scenes, of which 30 % carry another scene's caption; drawn when the folder has none."""
    if not any(folder.glob("*.tar")):
        write_demo_shards(folder)
    return f"{folder}/*.tar"
