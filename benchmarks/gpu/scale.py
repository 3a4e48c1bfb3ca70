"""Says how much is measured: enough for a GPU, or next to nothing, to see that everything works."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.material import Size

B32, L14 = "vit-b-32", "vit-l-14"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
        models: What is made for a size.
        precision: Of the scorers.
        drawn: Side of the JPEGs that are called 256 and 512 pixels, in pixels.
        num_distinct: Samples that differ; the shards hold them again and again.
        num_shards: By side, how many shards there are at least.
        batches: Sizes of the batches of a forward pass, by model.
        train_batch: Size of the batches of a training step.
        num_decided: By model, samples whose decisions are compared.
        num_on_cpu: By model, samples whose scores are compared with those of a CPU.
        seconds: What a measurement takes at least.
        loop_seconds: How long the plain loop is watched, for each size of batch.
        steps: Training steps, at least and at most.
    """

    models: Mapping[str, Size]
    precision: str
    drawn: Mapping[int, int]
    num_distinct: int
    num_shards: Mapping[int, int]
    batches: Mapping[str, tuple[int, ...]]
    train_batch: int
    num_decided: Mapping[str, int]
    num_on_cpu: Mapping[str, int]
    seconds: float
    loop_seconds: float
    steps: tuple[int, int]


FULL = Scale(
    models={B32: "vit-b-32", L14: "vit-l-14"},
    precision="auto",
    drawn={256: 256, 512: 512},
    num_distinct=4096,
    num_shards={256: 64, 512: 64},
    batches={B32: (64, 128, 256, 512, 1024), L14: (64, 256, 1024)},
    train_batch=256,
    num_decided={B32: 4096, L14: 1024},
    num_on_cpu={B32: 64, L14: 16},
    seconds=0.3,
    loop_seconds=4.0,
    steps=(12, 60),
)

QUICK = Scale(
    models={B32: "tiny", L14: "tiny"},
    precision="bf16",
    drawn={256: 64, 512: 96},
    num_distinct=64,
    num_shards={256: 6, 512: 3},
    batches={B32: (4, 8), L14: (4,)},
    train_batch=8,
    num_decided={B32: 64, L14: 48},
    num_on_cpu={B32: 8, L14: 8},
    seconds=0.02,
    loop_seconds=0.2,
    steps=(2, 3),
)
