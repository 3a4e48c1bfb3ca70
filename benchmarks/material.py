"""What is measured on: models of the usual sizes with random weights, and shards of photograph-like JPEGs."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import webdataset
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

Size = Literal["vit-b-32", "vit-l-14", "tiny", "tiny-224"]

#: Names what this code makes, in the cache: other code could make other models and samples.
_MADE_BY = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]

#: Samples per shard, except that the last may hold fewer.
SHARD_SAMPLES = 1024

#: Images that differ; more samples than these repeat them with other captions.
_NUM_IMAGES = 64
#: How much weaker each octave of an image is than the coarser one: a 512-pixel JPEG of quality 90 has 50 kB.
_PERSISTENCE = 0.72

_VIT_L_14 = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "projection_dim": 768,
}
_TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
_TINY = {
    "vision_config": {**_TINY_TOWER, "image_size": 32, "patch_size": 16},
    "text_config": _TINY_TOWER,
    "projection_dim": 32,
}
#: Sees images as a ViT-B/32 does.
_TINY_224 = {**_TINY, "vision_config": {**_TINY_TOWER, "image_size": 224, "patch_size": 32}}
_CONFIGS: dict[Size, dict[str, object]] = {
    "vit-b-32": {},
    "vit-l-14": _VIT_L_14,
    "tiny": _TINY,
    "tiny-224": _TINY_224,
}


@dataclass(frozen=True)
class Data:
    """Samples, as shards and as a table.

    Attributes:
        shards: The tars, as img2dataset writes them: 000000000.jpg and 000000000.txt, ...
        rows: The same samples in the same order, images as files of their own.
    """

    shards: list[Path]
    rows: list[tuple[Path, str]]

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.stat().st_size for shard in self.shards)


def make_model(cache: Path, size: Size) -> Path:
    """A CLIP with random weights; its forward pass costs what that of a trained one costs."""
    return _made_once(cache / _MADE_BY / "models" / size, lambda folder: _save_clip(folder, size))


def make_data(cache: Path, *, num_samples: int, image_size: int) -> Data:
    """Samples with square images of ``image_size`` pixels and captions of 10 to 29 tokens.

    The samples of a smaller number are the first ones of a larger.
    """
    images = _made_once(cache / _MADE_BY / "images" / str(image_size), lambda folder: _draw(folder, image_size))
    folder = _made_once(
        cache / _MADE_BY / "data" / f"{num_samples}x{image_size}",
        lambda folder: _write_data(folder, num_samples, images),
    )
    rows = json.loads((folder / "rows.json").read_text())
    return Data(sorted(folder.glob("*.tar")), [(images / image, caption) for image, caption in rows])


def make_shard(cache: Path, *, num_samples: int, image_size: int) -> Path:
    """The samples of :func:`make_data` as one shard that img2dataset could have written.

    With a json beside image and caption, and a header for the time of each member.
    """
    folder = _made_once(
        cache / _MADE_BY / "shards" / f"{num_samples}x{image_size}",
        lambda folder: _write_shard(
            folder / "shard.tar", make_data(cache, num_samples=num_samples, image_size=image_size)
        ),
    )
    return folder / "shard.tar"


def _made_once(folder: Path, make) -> Path:
    """A folder that is there whole or not at all."""
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


# --- models ---


def _save_clip(folder: Path, size: Size) -> None:
    tokenizer = _byte_tokenizer()
    config = CLIPConfig(**_CONFIGS[size])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    pixels = config.vision_config.image_size
    image_processor = CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels})
    processor = CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    _make_positive(model, processor, pixels)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.inference_mode()
def _make_positive(model: CLIPModel, processor: CLIPProcessor, pixels: int) -> None:
    """Mirror the text embeddings if need be: random scores lie around one value, which must not be clipped to 0."""
    rng = np.random.default_rng(0)
    inputs = processor(
        images=[_picture(rng, pixels) for _ in range(4)], text=[_caption(rng) for _ in range(4)],
        return_tensors="pt", padding=True,
    )  # fmt: skip
    if model(**inputs).logits_per_image.mean() < 0:
        model.text_projection.weight.neg_()


def _byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows no words: each byte is a token."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)


# --- data ---


def _draw(folder: Path, image_size: int) -> None:
    def draw(number: int) -> None:
        _picture(np.random.default_rng(number), image_size).save(folder / f"{number:02d}.jpg", quality=90)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(draw, range(_NUM_IMAGES)))


def _write_data(folder: Path, num_samples: int, images: Path) -> None:
    rng = np.random.default_rng(0)
    jpegs = [path.read_bytes() for path in sorted(images.iterdir())]
    rows = [(f"{number % len(jpegs):02d}.jpg", _caption(rng)) for number in range(num_samples)]
    (folder / "rows.json").write_text(json.dumps(rows))
    for shard, start in enumerate(range(0, num_samples, SHARD_SAMPLES)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, (_, caption) in enumerate(rows[start : start + SHARD_SAMPLES], start):
                for extension, data in (("jpg", jpegs[number % len(jpegs)]), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def _write_shard(path: Path, data: Data) -> None:
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(path)) as tar:
        for number, (image, caption) in enumerate(data.rows):
            key = f"{number:09d}"
            record = {"uid": rng.bytes(16).hex(), "caption": caption, "url": "u" * 100, "key": key, "exif": "e" * 300}
            tar.write({"__key__": key, "jpg": image.read_bytes(), "json": record, "txt": caption})


def _picture(rng: np.random.Generator, size: int) -> Image.Image:
    """Smooth areas, edges and grain in the shares of a photograph: noise of all scales, fine noise being weaker."""
    total = np.zeros((size, size, 3), dtype=np.float32)
    for octave, side in enumerate(_sides(size)):
        noise = rng.standard_normal((3, side, side)).astype(np.float32)
        channels = [Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC) for channel in noise]
        total += _PERSISTENCE**octave * np.stack([np.asarray(channel) for channel in channels], axis=-1)
    total = (total - total.min()) / np.ptp(total)
    return Image.fromarray((255 * total).astype(np.uint8))


def _sides(size: int) -> Iterator[int]:
    side = 2
    while side <= size:
        yield side
        side *= 2


def _caption(rng: np.random.Generator) -> str:
    """Words of 10 to 29 tokens in all, start and end included; a letter is a token."""
    letters = "".join(rng.choice(list("aeiourstlnmdcp"), rng.integers(8, 28)))
    words, start = [], 0
    while start < len(letters):
        length = int(rng.integers(2, 8))
        words.append(letters[start : start + length])
        start += length
    return " ".join(words)
