"""Says what the package has to reach on an H100 or H200 with 16 cores, and whether it does."""

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.record import Record
from benchmarks.gpu.scale import B32, L14


@dataclass(frozen=True)
class Target:
    """What a figure has to be.

    Attributes:
        name: What is promised.
        part: Who measures it.
        figure: Under which name.
        of: Part and figure that it is divided by; None where it stands for itself.
        least: What it has to be at least; None where it has a largest value.
        most: What it may be at most.
    """

    name: str
    part: str
    figure: str
    of: tuple[str, str] | None = None
    least: float | None = None
    most: float | None = None

    def found_in(self, record: Record) -> float | None:
        """The value; None where it, or what it is divided by, was not measured."""
        found, by = record.figure(self.part, self.figure), 1.0
        if self.of is not None:
            by = record.figure(*self.of)
        return None if found is None or not by else found / by

    def is_met(self, found: float) -> bool:
        """Whether this value will do."""
        return (self.least is None or found >= self.least) and (self.most is None or found <= self.most)

    @property
    def wanted(self) -> str:
        """As it is printed."""
        return f"at least {self.least:,}" if self.least is not None else f"at most {self.most:,}"


# fmt: off
TARGETS = (
    Target("ViT-B/32 rewrite, 256 px, samples/s", f"rewrite {B32}, 256 px", "samples_per_s", least=12_000),
    Target("ViT-B/32 inline, 256 px, samples/s", f"inline {B32}, 256 px", "samples_per_s", least=12_000),
    Target(
        "ViT-B/32 rewrite, 512 px, of what all cores decode", f"rewrite {B32}, 512 px", "samples_per_s",
        of=("decoding", "512 px, all"), least=0.9,
    ),
    Target(
        "ViT-B/32 inline, 512 px, of what all cores decode", f"inline {B32}, 512 px", "samples_per_s",
        of=("decoding", "512 px, all"), least=0.9,
    ),
    Target("ViT-L/14 rewrite, 256 px, samples/s", f"rewrite {L14}, 256 px", "samples_per_s", least=2_500),
    Target("ViT-L/14 inline, 256 px, samples/s", f"inline {L14}, 256 px", "samples_per_s", least=2_500),
    Target("ViT-B/32 forward pass, of the matmul rate", f"forward {B32}", "flops", of=("matmul", "flops"), least=0.5),
    Target("ViT-L/14 forward pass, of the matmul rate", f"forward {L14}", "flops", of=("matmul", "flops"), least=0.6),
    Target(
        "ViT-B/32 rewrite, times the plain loop", f"rewrite {B32}, 256 px", "samples_per_s",
        of=(f"plain loop {B32}, 256 px", "samples_per_s"), least=5,
    ),
    Target("ViT-B/32 decisions other than float32's", f"decisions {B32}", "other_decisions", most=0),
    Target("ViT-L/14 decisions other than float32's", f"decisions {L14}", "other_decisions", most=0),
    Target("ViT-B/32 float32 scores off the CPU's", f"decisions {B32}", "off_float32_of_cpu", most=1e-5),
    Target("ViT-L/14 float32 scores off the CPU's", f"decisions {L14}", "off_float32_of_cpu", most=1e-5),
    Target("Training step of 16 forward passes, overhead in %", f"overhead {B32}, 16x", "all kept, overhead_%", most=8),
)
# fmt: on


def met_targets(record: Record) -> list[dict[str, Any]]:
    """Of each target what was measured, and whether it is met; None where it was not measured."""
    rows = []
    for target in TARGETS:
        found = target.found_in(record)
        met = None if found is None else target.is_met(found)
        rows.append({"target": target.name, "wanted": target.wanted, "measured": found, "met": met})
    return rows
