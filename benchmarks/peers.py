"""How people filter without this package: the operator's loop, and webdataset with a batched model."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPProcessor

from benchmarks.material import Data
from benchmarks.options import Options
from benchmarks.rounds import Outcome

#: Share of the pairs that is kept, as by DataComp's baseline of CLIP scores.
_KEEP_FRACTION = 0.3


class OperatorLoop:
    """DataFlow's ``ImageClipFilter``, which is the reference for scores: one row at a time, in float32."""

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, threshold: float) -> None:
        self._model, self._processor, self._threshold = model, processor, threshold

    def __call__(self, data: Data) -> Outcome:
        kept = (number for number, row in enumerate(data.rows) if self.similarity(*row) >= self._threshold)
        return Outcome(len(data.rows), frozenset(f"{number:09d}" for number in kept))

    @torch.inference_mode()
    def similarity(self, path: Path, caption: str) -> float:
        try:
            image = Image.open(path).convert("RGB")
        except OSError:
            return 0.0
        if not caption.strip():
            return 0.0
        inputs = self._processor(text=[caption], images=[image], return_tensors="pt", padding=True, truncation=True)
        inputs = inputs.to(self._model.device)
        images = functional.normalize(self._model.get_image_features(inputs["pixel_values"]).pooler_output, dim=-1)
        texts = functional.normalize(
            self._model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output, dim=-1
        )
        return min(max((images @ texts.T).item(), 0.0), 1.0)


class WebDatasetLoop:
    """webdataset, a DataLoader and a batched ``CLIPModel``; it decides, and writes nothing.

    Args:
        model: In the precision to compute in.
        processor: Pixels and tokens.
        options: Batch size and workers.
        threshold: Of what is kept.
        trimmed: Pad captions to the batch's longest instead of the model's 77 tokens, which is what the tokenizers of
            CLIP and open_clip (and so clip-retrieval) do.
    """

    def __init__(
        self,
        model: CLIPModel,
        processor: CLIPProcessor,
        options: Options,
        *,
        threshold: float,
        trimmed: bool = False,
    ) -> None:
        self._model, self._processor, self._threshold = model, processor, threshold
        self._padding = "longest" if trimmed else "max_length"
        self._batch_size, self._num_workers = options.batch_size, options.workers

    def __call__(self, data: Data) -> Outcome:
        seen, kept = 0, set()
        for keys, scores in self.scores(data):
            seen += len(keys)
            kept |= {key for key, keep in zip(keys, (scores >= self._threshold).tolist(), strict=True) if keep}
        return Outcome(seen, frozenset(kept))

    @torch.inference_mode()
    def scores(self, data: Data) -> Iterator[tuple[list[str], Tensor]]:
        """Keys and similarities, in batches."""
        device = self._model.device
        for keys, pixel_values, tokens in self._loader(data):
            tokens = {name: values.to(device, non_blocking=True) for name, values in tokens.items()}
            pixels = pixel_values.to(device, self._model.dtype, non_blocking=True)
            images = self._model.get_image_features(pixels).pooler_output.float()
            texts = self._model.get_text_features(**tokens).pooler_output.float()
            cosine = (functional.normalize(images, dim=-1) * functional.normalize(texts, dim=-1)).sum(dim=-1)
            yield keys, cosine.clip(0.0, 1.0).cpu()

    def _loader(self, data: Data) -> DataLoader:
        shards = [str(shard) for shard in data.shards]
        if len(shards) >= max(1, self._num_workers):
            samples = wds.WebDataset(shards, shardshuffle=False)
        else:  # split by sample
            samples = wds.WebDataset(shards, shardshuffle=False, workersplitter=None).compose(wds.split_by_worker)
        dataset = (
            samples.decode("pil")
            .to_tuple("__key__", "jpg", "txt")
            .map_tuple(lambda key: key, self._pixels, lambda caption: caption)
            .batched(self._batch_size)
            .map_tuple(lambda keys: keys, lambda pixels: pixels, self._tokens)
        )
        return DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=self._model.device.type == "cuda",
            worker_init_fn=_tokenize_in_one_thread,
        )

    def _pixels(self, image: Image.Image) -> Tensor:
        return self._processor.image_processor(image, return_tensors="pt").pixel_values[0]

    def _tokens(self, captions: list[str]) -> dict[str, Tensor]:
        return dict(self._processor.tokenizer(captions, return_tensors="pt", padding=self._padding, truncation=True))


def _tokenize_in_one_thread(_worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core's worth of work


def usual_threshold(loop: WebDatasetLoop, options: Options) -> float:
    """A threshold that keeps the usual share of the samples, in the widest gap between scores thereabouts.

    In a narrower gap float32 itself would decide now one way and now the other, by the batch.
    """
    scores = np.sort(np.concatenate([scores.numpy() for _, scores in loop.scores(options.data(1 / 4))]))[::-1]
    first, last = (int(len(scores) * share) for share in (_KEEP_FRACTION * 0.8, _KEEP_FRACTION * 1.2))
    around = scores[first : last + 2]
    if not around[-1] > 0:
        raise SystemExit("most scores of this model are clipped to 0, so no threshold keeps a part of the samples")
    widest = int((around[:-1] - around[1:]).argmax())
    return float(around[widest : widest + 2].mean())
