"""Makes small real things for tests: random CLIPs, images, shards, and the reference for scores."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from clipfilter_wds.shards.open import OpenShard, open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.types import Sample, ShardEnd, ShardIdentity
from tests.support.image_processors import as_seen, options_of

#: Members of a sample: extension -> bytes.
Members = Mapping[str, bytes]


def make_clip(
    folder: Path, *, image_size: int = 32, patch_size: int = 16, width: int = 32, seed: int = 0, layers: int = 2
) -> Path:
    """A randomly initialised CLIP with a byte-level tokenizer, saved as Hugging Face saves them."""
    torch.manual_seed(seed)
    tokenizer = _byte_tokenizer()
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 77,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": image_size, "patch_size": patch_size},
        projection_dim=width,
        # Larger than usual, so that the scores of a random model spread.
        initializer_factor=8.0,
    )
    CLIPModel(config).eval().save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size)
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def _byte_tokenizer() -> CLIPTokenizerFast:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with TemporaryDirectory() as folder:  # made of files, which all releases of transformers read
        Path(folder, "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizerFast.from_pretrained(folder, model_max_length=77)


def photo(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random colour image that differs from seed to seed; ``size`` is width and height."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pair(seed: int, *, size: tuple[int, int] = (48, 40)) -> dict[str, bytes]:
    """A usable sample."""
    return {"jpg": encoded(photo(seed, size), quality=90), "txt": f"photo number {seed}".encode()}


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: object) -> Path:
    """A tar of named members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, **options))
    return path


def write_shard(path: Path, samples: Iterable[Members], *, start: int = 0) -> Path:
    """A shard as img2dataset writes them: samples with keys 000000000, 000000001, ..."""
    numbered = enumerate(samples, start)
    return write_tar(path, [(f"{key:09d}.{ext}", data) for key, sample in numbered for ext, data in sample.items()])


def tar_members(path: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of a tar's members, in order."""
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


class Reference:
    """The plain loop: ``CLIPProcessor`` and ``CLIPModel`` in float32, one pair at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder).float().eval()
        self.processor = CLIPProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def score(self, image: Image.Image, caption: str) -> float:
        """Raw cosine of one pair."""
        image = as_seen(image.convert("RGB"))
        options = options_of(self.processor.image_processor)
        inputs = self.processor(
            text=[caption], images=image, return_tensors="pt", padding=True, truncation=True, **options
        )
        output = self.model(**inputs)
        return (output.image_embeds * output.text_embeds).sum().item()


def tar_bytes(members: Iterable[tuple[str, bytes]], **options: object) -> bytes:
    """A tar of named members, in order, in memory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def raw_member(info: tarfile.TarInfo, data: bytes = b"", tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    """Header and padded data of one member, whatever its header claims."""
    return info.tobuf(tar_format, "utf-8", "surrogateescape") + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def read_shard(data: bytes, layout: SampleLayout | None = None, **options: object) -> tuple[list[Sample], ShardEnd]:
    """Everything that a shard with these bytes yields."""
    shard = OpenShard(url="toy.tar", stream=io.BytesIO(data), identity=ShardIdentity(len(data)))
    *samples, end = read_samples(shard, layout or SampleLayout(), **options)
    return samples, end


def read_whole(url: str, *, allow_pipe: bool = False) -> bytes:
    """All bytes of a shard, unpacked."""
    with open_shard(url, allow_pipe=allow_pipe) as shard:
        return shard.stream.read()
