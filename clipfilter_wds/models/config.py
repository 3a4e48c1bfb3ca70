"""Says which model scores, where, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Reduce = Literal["max", "mean", "min"]

DEFAULT_MODEL = "openai/clip-vit-base-patch32"


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """The model, and how :class:`ClipScorer` runs it.

    Attributes:
        model: A Hugging Face hub id or a local folder, of a CLIP, MetaCLIP 2, SigLIP, SigLIP 2 (fixed resolution),
            AltCLIP or ChineseCLIP; open_clip: before the hub id or folder of an open_clip model; or demo-tiny, the
            bundled CLIP, which knows nothing but drawn scenes.
        revision: Branch, tag or commit of a hub model.
        device: auto (CUDA if there is one), or any torch device: cpu, cuda, cuda:1.
        precision: fp32, or the type that matrices are multiplied in: bf16, fp16. Scores near the threshold are then
            computed again in fp32, so that the decisions are fp32's. auto is the fastest: fp16 on CUDA, bf16 on a CPU
            with instructions for it, fp32 on other CPUs and for small models.
        reduce: Where an image has several captions, which of their similarities counts: the largest (max), the mean or
            the smallest (min).
        flip: Score the mirrored image too and take the mean, so that text painted into a picture counts for less.
        fast_decode: Decode large JPEGs at a fraction of their size, but not below what the model takes: faster
            (2.2 times at 2,048 pixels), with slightly different pixels and so slightly different scores.
        resize_on_device: For a GPU with few CPU cores: have it resize images of up to 512 x 512 pixels, which spares
            the cores that decode. The pixels, and so the scores, of most models are the same; of open_clip's they may
            differ a little.
        compile: Compile the low-precision model with torch.compile, which takes a minute or so at the start. On a CPU,
            CLIP's text tower is left out: it is faster as it is.
        cuda_graphs: On CUDA, launch each tower as one CUDA graph, for a few sizes of batches, so that the GPU does not
            wait for Python; it takes a few seconds at the start. What is compiled is launched as usual.

    Raises:
        ValueError: When ``precision`` or ``reduce`` is none of these.
    """

    model: str | Path = DEFAULT_MODEL
    revision: str | None = None
    device: str = "auto"
    precision: Precision = "auto"
    reduce: Reduce = "max"
    flip: bool = False
    fast_decode: bool = False
    resize_on_device: bool = False
    compile: bool = False
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {self.precision!r}; use auto, fp32, bf16 or fp16")
        if self.reduce not in get_args(Reduce):
            raise ValueError(f"reduce is {self.reduce!r}; use max, mean or min")
