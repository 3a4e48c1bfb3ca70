"""CPU time of the stages of a decoding worker, one at a time, beside bare decoding and resizing of the same images."""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from clipfilter_wds.preprocess.batch import BatchBuilder, new_buffer
from clipfilter_wds.preprocess.clip import ClipPreprocess, ImageOut
from clipfilter_wds.preprocess.members import decode_sample, read_uid
from clipfilter_wds.preprocess.packed import ImagePacker
from clipfilter_wds.shards.samples import SampleLayout, read_part, read_samples
from clipfilter_wds.shards.split import ShardPart
from clipfilter_wds.types import Sample, ShardEnd
from clipfilter_wds.workers.process import init_worker

#: Of the shard's samples, how many go through the stages behind the tar.
_NUM_SAMPLES = 256

_LAYOUT = SampleLayout()

#: Bare decoding, and resizing and cropping by either library, in what :func:`stage_times` returns.
BARE_DECODE, BARE_PILLOW, BARE_TORCHVISION = "bare decode", "bare Pillow", "bare torchvision"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker does.

    Attributes:
        preprocess: The scorer's.
        shard: What is read.
        batch_size: Samples per batch.
        image_transform: Makes the training views; None where there are none but CLIP's.
        interleaved: Whether CLIP's views are interleaved.
    """

    preprocess: ClipPreprocess
    shard: Path
    batch_size: int
    image_transform: Callable[[Image.Image], Any] | None
    interleaved: bool

    def samples(self) -> Iterator[Sample]:
        read = partial(read_samples, layout=_LAYOUT, pair_only=True)
        return (item for item in read_part(ShardPart(str(self.shard)), read) if not isinstance(item, ShardEnd))


def stage_times(work: Work, *, repeats: int) -> list[dict[str, float]]:
    """Microseconds per sample of each stage and of bare decoding, as often as that, in processes set up as workers."""
    return [
        bare | stages
        for bare, stages in zip(
            _in_process(_bare_times, work, repeats), _in_process(_worker_times, work, repeats), strict=True
        )
    ]


def _in_process(times: Callable[[Work], dict[str, float]], work: Work, repeats: int) -> list[dict[str, float]]:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send_times, args=(there, times, work, repeats))
    process.start()
    there.close()
    received = here.recv()
    process.join()
    return received


def _send_times(pipe: Connection, times: Callable[[Work], dict[str, float]], work: Work, repeats: int) -> None:
    init_worker(0)
    torch.set_num_threads(1)
    pipe.send([times(work) for _ in range(repeats)])


class _Timer:
    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self._seconds[stage] += time.process_time() - started

    def per_sample(self, num_samples: int) -> dict[str, float]:
        """Microseconds."""
        return {stage: 1e6 * seconds / num_samples for stage, seconds in self._seconds.items()}


def _bare_times(work: Work) -> dict[str, float]:
    timed, samples = _Timer(), [*islice(work.samples(), _NUM_SAMPLES)]
    jpegs = [next(member.data for member in sample.members if member.extension == "jpg") for sample in samples]
    shortest, (height, width) = work.preprocess.view.resize, work.preprocess.view.crop

    def sizes(pixels: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width after resizing, and where the crop begins."""
        scale = shortest / min(pixels.shape[:2])
        to_height, to_width = (round(side * scale) for side in pixels.shape[:2])
        return (to_height, to_width), ((to_height - height) // 2, (to_width - width) // 2)

    for jpeg in jpegs:
        with timed(BARE_DECODE):
            pixels = simplejpeg.decode_jpeg(jpeg)
        size, (top, left) = sizes(pixels)
        with timed(BARE_TORCHVISION):
            channels = torch.from_numpy(pixels).permute(2, 0, 1)
            resized = tvf.resize(channels, [*size], InterpolationMode.BICUBIC, antialias=True)
            tvf.crop(resized, top, left, height, width)
    for jpeg in jpegs:  # apart, since it pushes what the other needs out of the caches
        pixels = simplejpeg.decode_jpeg(jpeg)
        size, (top, left) = sizes(pixels)
        with timed(BARE_PILLOW):
            image = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
            image.crop((left, top, left + width, top + height))
    return timed.per_sample(len(samples))


def _worker_times(work: Work) -> dict[str, float]:
    of_tar = _Timer()
    with of_tar("tar"):
        num_samples = sum(1 for _ in work.samples())
    timed, samples = _Timer(), [*islice(work.samples(), _NUM_SAMPLES)]
    for start in range(0, len(samples), work.batch_size):
        _prepare(work, samples[start : start + work.batch_size], timed)
    return of_tar.per_sample(num_samples) | timed.per_sample(len(samples))


def _prepare(work: Work, samples: list[Sample], timed: _Timer) -> None:
    """What a batch goes through. Images are written to one new buffer, as a batch's are."""
    preprocess, outs = work.preprocess, _outs(work, len(samples))
    pairs, views = [], []
    for sample, out in zip(samples, outs, strict=True):
        with timed("decode"):
            rgb, captions = decode_sample(sample, _LAYOUT, preprocess.decoder(out))
        with timed("resize"):
            pairs.append(preprocess.prepare(rgb, captions, out))
        if work.image_transform is not None:
            with timed("view"):
                views.append(work.image_transform(rgb.image))
    if views:
        with timed("view"):
            default_collate(views)
    with timed("tokens"):
        tokens = preprocess.tokenize([pair.captions for pair in pairs])
    tokenized = replace(preprocess, tokenize=lambda captions: tokens)
    builder = BatchBuilder(tokenized, len(samples), interleaved=work.interleaved)
    with timed("build"):
        for sample, pair in zip(samples, pairs, strict=True):
            builder.add(sample.key, sample.index, lambda out, pair=pair: pair, uid=read_uid(sample))
        builder.build()


def _outs(work: Work, num_samples: int) -> Iterator[ImageOut]:
    """Where the images of a batch go, one after another."""
    view, buffer = (
        work.preprocess.view,
        new_buffer(num_samples * work.preprocess.view_bytes(interleaved=work.interleaved)),
    )
    if view.resize_on_device:
        packer = ImagePacker(view, num_samples, new_buffer)
        return map(packer.at, range(num_samples))
    height, width = view.crop
    if work.interleaved:
        return iter(buffer.view(-1, height, width, 4).permute(0, 3, 1, 2))
    return iter(buffer.view(-1, 3, height, width))
