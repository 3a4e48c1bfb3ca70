"""Contenders timed in turns, so that whatever else the machine does strikes all of them alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.material import Data


@dataclass(frozen=True)
class Outcome:
    """What a turn did.

    Attributes:
        num_samples: How many samples (or steps) it took.
        kept: Keys of those it kept; None where nothing is decided.
        num_rechecked: How many were near the threshold and scored again in float32; None where that is not known.
    """

    num_samples: int
    kept: frozenset[str] | None = None
    num_rechecked: int | None = None


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: As it is printed.
        turn: Does the work once.
        share: Which part of the samples a turn takes; slow ones take fewer.
    """

    name: str
    turn: Callable[[Data], Outcome]
    share: float = 1.0


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1 if self.median < 100 else 0
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


def in_turns(
    contenders: Sequence[Contender],
    data: Callable[[float], Data],
    *,
    rounds: int,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, list[float]], dict[str, Outcome]]:
    """Samples per second of each contender in each round, and what its last turn did.

    Each has a short turn before the first round, which is not counted.

    Args:
        contenders: In the order of their turns.
        data: Share of the samples -> these samples.
        rounds: Turns of each.
        tell: Called with a line per turn.
    """
    for contender in contenders:
        contender.turn(data(contender.share / 8))
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    outcomes: dict[str, Outcome] = {}
    for number in range(rounds):
        for contender in contenders:
            samples = data(contender.share)
            started = time.perf_counter()
            outcome = outcomes[contender.name] = contender.turn(samples)
            rates[contender.name].append(outcome.num_samples / (time.perf_counter() - started))
            tell(f"round {number + 1}/{rounds}  {contender.name}: {rates[contender.name][-1]:,.1f}/s")
    return rates, outcomes


def ratios(rates: Sequence[float], base: Sequence[float]) -> Spread:
    """How many times as fast, compared within each round."""
    return Spread.of([mine / other for mine, other in zip(rates, base, strict=True)])
