"""What bounds any filter on this machine: the model's forward pass, decoding, copying, and multiplying matrices."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPModel

from benchmarks.material import Data
from benchmarks.options import Options
from benchmarks.rounds import Contender, Outcome
from clipfilter_wds import ClipScorer

IMAGES, TEXTS, SCORER, DECODE, COPY = "image tower", "text tower", "scorer alone", "decode, one core", "cp"


def limit_contenders(options: Options, model: CLIPModel, scorer: ClipScorer, *, suffix: str = "") -> list[Contender]:
    """The terms of the limit.

    Args:
        options: Batch size and device.
        model: A bare CLIP, in the precision that suits the device.
        scorer: For its preprocessing, and as a contender itself, with everything ready on the device.
        suffix: Of the names.
    """
    forward = _Forward(options, model, scorer)
    return [
        Contender(IMAGES + suffix, forward.images, share=0.25),
        Contender(TEXTS + suffix, forward.texts),
        Contender(SCORER + suffix, forward.scorer, share=0.25),
    ]


def machine_contenders(scorer: ClipScorer) -> list[Contender]:
    """The limits that have nothing to do with the model."""
    return [Contender(DECODE, _Decode(scorer), share=0.5), Contender(COPY, _copy)]


def attainable(rates: Mapping[str, list[float]], device: torch.device, cores: int, *, suffix: str = "") -> list[float]:
    """Per round, samples per second that forward pass and decoding allow; none when a term was not measured.

    On a CPU they share the cores: 1 / (t_forward + t_decode / cores). Beside a GPU the slower of the two decides.
    """
    names = (IMAGES + suffix, TEXTS + suffix, DECODE)
    if not {*names} <= rates.keys():
        return []
    terms = zip(*(rates[name] for name in names), strict=True)
    together = max if device.type == "cuda" else sum
    return [1 / together((1 / images + 1 / texts, 1 / (decode * cores))) for images, texts, decode in terms]


class _Forward:
    """The towers alone, on batches that are ready on the device."""

    def __init__(self, options: Options, model: CLIPModel, scorer: ClipScorer) -> None:
        self._batch_size, self._model, self._scorer = options.batch_size, model, scorer

    def images(self, data: Data) -> Outcome:
        size = self._scorer.preprocess.view.crop
        pixels = torch.randn(self._batch_size, 3, *size).to(self._model.device, self._model.dtype)
        return self._run(data, lambda: self._model.get_image_features(pixels).pooler_output)

    def texts(self, data: Data) -> Outcome:
        """Captions sorted by length, so that hardly any padding is left."""
        captions = sorted((caption for _, caption in data.rows), key=len)
        batches = [captions[start : start + self._batch_size] for start in range(0, len(captions), self._batch_size)]
        ids = iter(
            [
                self._scorer.preprocess.tokenize([[caption] for caption in batch]).input_ids.to(self._model.device)
                for batch in batches
            ]
        )
        with torch.inference_mode():
            for batch in ids:
                self._model.get_text_features(batch)
        _synchronize(self._model.device)
        return Outcome(len(captions))

    def scorer(self, data: Data) -> Outcome:
        """The whole of :class:`ClipScorer`, as batches come: images are on the device, captions on the host."""
        captions = [caption for _, caption in data.rows][: self._batch_size]
        ids = self._scorer.preprocess.tokenize([[caption] for caption in captions]).input_ids
        size = self._scorer.preprocess.view.crop
        pixels = torch.randint(0, 256, (len(captions), 3, *size), dtype=torch.uint8).to(self._model.device)
        batches = max(1, round(len(data.rows) / len(captions)))
        for _ in range(batches):
            self._scorer(pixels, ids)
        _synchronize(self._model.device)
        return Outcome(batches * len(captions))

    def _run(self, data: Data, forward: Callable[[], Tensor]) -> Outcome:
        batches = max(1, round(len(data.rows) / self._batch_size))
        with torch.inference_mode():
            for _ in range(batches):
                forward()
        _synchronize(self._model.device)
        return Outcome(batches * self._batch_size)


class _Decode:
    """Bytes to the model's view, as a worker does it."""

    def __init__(self, scorer: ClipScorer) -> None:
        self._preprocess = scorer.preprocess

    def __call__(self, data: Data) -> Outcome:
        with _one_thread():
            for image, caption in data.rows:
                self._preprocess.open_pair(image.read_bytes(), caption)
        return Outcome(len(data.rows))


def _copy(data: Data) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        for shard in data.shards:
            shutil.copy(shard, folder)
    return Outcome(len(data.rows))


# --- floating point ---


def flops_per_sample(model: CLIPModel, image_size: tuple[int, int], ids: Tensor) -> float:
    """Floating-point operations of the forward pass for one image and one caption, counted, padding included."""
    return image_flops(model, image_size) + text_flops(model, ids) / len(ids)


def image_flops(model: CLIPModel, image_size: tuple[int, int]) -> int:
    """Those for one image."""
    pixels = torch.zeros(1, 3, *image_size, device=model.device, dtype=model.dtype)
    return _flops(lambda: model.get_image_features(pixels))


def text_flops(model: CLIPModel, ids: Tensor) -> int:
    """Those for these captions."""
    return _flops(lambda: model.get_text_features(ids))


@torch.inference_mode()
def _flops(forward: Callable[[], object]) -> int:
    # Attention as products of matrices: not all of its kernels are counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """FLOP/s of a large matrix product, which is all that the machine gives in practice."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        _synchronize(device)
        started = time.perf_counter()
        left @ right
        _synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """DataLoader workers compute with one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
