"""Measures JPEGs decoded and resized on the GPU, by torchvision, for those who wonder whether workers are needed."""

from typing import Any

import torch
from torch.nn import functional
from torchvision.io import decode_jpeg

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.timing import seconds_of


def nvjpeg(bench: Bench) -> dict[str, Any]:
    """Images per second, by size: decoded, and those resized in one batch."""
    found = {}
    for image_size in bench.scale.drawn:
        images = sorted({image for image, _ in bench.data(image_size).rows})
        encoded = [torch.frombuffer(bytearray(image.read_bytes()), dtype=torch.uint8) for image in images]
        decoded = torch.stack(decode_jpeg(encoded, device=bench.device))

        def decode(encoded: list[torch.Tensor] = encoded) -> None:
            decode_jpeg(encoded, device=bench.device)

        def resize(decoded: torch.Tensor = decoded) -> None:
            functional.interpolate(decoded.float(), size=(224, 224), mode="bicubic", antialias=True)

        for name, work in (("decoded/s", decode), ("resized/s", resize)):
            seconds = seconds_of(work, bench.device, least=2 * bench.scale.seconds)
            found[f"{image_size} px, {name}"] = round(len(images) / seconds)
    return found
