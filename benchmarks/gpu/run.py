"""Runs the parts that are missing, the most important first, as long as there is time."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from benchmarks.gpu import scale
from benchmarks.gpu.attention import attention
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.copies import copies
from benchmarks.gpu.decisions import decisions
from benchmarks.gpu.decoding import decoding
from benchmarks.gpu.end_to_end import inline, plain_loop, rewrite
from benchmarks.gpu.forward import forward, matmul, plain_forward
from benchmarks.gpu.kernels import kernels
from benchmarks.gpu.nvjpeg import nvjpeg
from benchmarks.gpu.overhead import overhead
from benchmarks.gpu.record import FAILED, LEFT_OUT, Record
from benchmarks.gpu.scale import B32, L14
from benchmarks.gpu.table import as_markdown
from benchmarks.gpu.targets import met_targets
from benchmarks.options import Options
from benchmarks.report import Report, machine


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Attributes:
        name: By which it is kept, and asked for.
        seconds: What it takes on an H100 with 16 cores, about.
        measure: Gives its figures.
        needs_gpu: Whether it takes minutes on a CPU, even of the smallest model.
    """

    name: str
    seconds: float
    measure: Callable[[Bench], dict[str, Any]]
    needs_gpu: bool = False


#: A part that takes so many times as long as expected is ended: it hangs, or would leave no time for the others.
_MOST_TIMES = 4

#: In order of importance.
PARTS = (
    Part("matmul", 12, matmul),
    Part(f"forward {B32}", 12, lambda bench: forward(bench, B32)),
    Part(f"decisions {B32}", 10, lambda bench: decisions(bench, B32)),
    Part("decoding", 8, decoding),
    Part(f"rewrite {B32}, 256 px", 12, lambda bench: rewrite(bench, B32, 256)),
    Part(f"plain loop {B32}, 256 px", 25, lambda bench: plain_loop(bench, B32, 256)),
    Part(f"inline {B32}, 256 px", 12, lambda bench: inline(bench, B32, 256)),
    Part(f"overhead {B32}, 16x", 15, lambda bench: overhead(bench, B32, 16)),
    Part(f"rewrite {B32}, 512 px", 12, lambda bench: rewrite(bench, B32, 512)),
    Part(f"inline {B32}, 512 px", 12, lambda bench: inline(bench, B32, 512)),
    Part(f"forward {L14}", 20, lambda bench: forward(bench, L14)),
    Part(f"rewrite {L14}, 256 px", 12, lambda bench: rewrite(bench, L14, 256)),
    Part(f"inline {L14}, 256 px", 12, lambda bench: inline(bench, L14, 256)),
    Part(f"decisions {L14}", 20, lambda bench: decisions(bench, L14)),
    Part(f"plain forward {B32}", 6, lambda bench: plain_forward(bench, B32)),
    Part(f"overhead {B32}, 4x", 12, lambda bench: overhead(bench, B32, 4)),
    Part(f"overhead {B32}, 1x", 12, lambda bench: overhead(bench, B32, 1)),
    Part(f"kernels {B32}", 6, lambda bench: kernels(bench, B32)),
    Part("copies", 4, copies),
    Part("attention", 5, attention),
    Part(f"plain forward {L14}", 10, lambda bench: plain_forward(bench, L14)),
    Part(f"kernels {L14}", 6, lambda bench: kernels(bench, L14)),
    Part("nvjpeg", 8, nvjpeg),
    Part(f"forward {B32}, eager", 10, lambda bench: forward(bench, B32, cuda_graphs=False)),
    Part(f"forward {B32}, compiled", 60, lambda bench: forward(bench, B32, compile=True), needs_gpu=True),
    Part(f"forward {L14}, eager", 20, lambda bench: forward(bench, L14, cuda_graphs=False)),
    Part(f"forward {L14}, compiled", 80, lambda bench: forward(bench, L14, compile=True), needs_gpu=True),
)


def gpu(options: Options, report: Report) -> None:
    """Measure what the folder has no figures of, and write ``gpu.json`` and ``gpu.md`` after each part.

    Raises:
        SystemExit: When there is no GPU and this is no ``quick`` run, or the folder is another machine's.
    """
    is_on_gpu = options.torch_device.type == "cuda"
    if not is_on_gpu and not options.quick:
        raise SystemExit("gpu measures a CUDA device, and this is a CPU; add --quick true to see that everything works")
    record = Record(options.output, {"quick": options.quick, **machine()})
    parts = [part for part in PARTS if options.wants(part.name) and (is_on_gpu or not part.needs_gpu)]
    missing = [part for part in parts if not record.is_done(part.name)]
    phases = {"start": _seconds_since_start()}
    record.content["phases"].append(phases)
    with Bench(options, scale.QUICK if options.quick else scale.FULL, record) as bench:
        phases["samples"] = _timed(lambda: [bench.shards(size) for size in bench.scale.drawn])
        for part in missing:
            figures = _measured(part, bench)
            record.parts[part.name] = figures
            report.tell(f"{_seconds_since_start():.0f} s  {part.name}: {_in_a_line(figures)}")
            _conclude(options, record)
    phases["all"] = _seconds_since_start()
    print(_conclude(options, record))


def _measured(part: Part, bench: Bench) -> dict[str, Any]:
    """The figures of a part, or why there are none."""
    left = bench.options.budget - _seconds_since_start()
    if part.seconds > left:
        return {LEFT_OUT: f"{left:.0f} s were left, and it takes about {part.seconds:.0f}"}
    figures: dict[str, Any] = {}

    def measure() -> None:
        try:
            with time_limit(min(_MOST_TIMES * part.seconds, left)):
                figures.update(part.measure(bench))
        except Exception as error:  # noqa: BLE001  # the other parts are worth having
            figures.update({FAILED: f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-3000:]})

    seconds = _timed(measure)
    if bench.device.type == "cuda":
        with suppress(RuntimeError):  # some errors leave a process no GPU; the figures are to be written all the same
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # page-locked memory, the next part's else; public in newer torch
    return {**figures, "seconds": seconds}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """In the main thread: end what runs in this context after so many seconds.

    Raises:
        TimeoutError: Then.
    """

    def end(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"it took longer than {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _in_a_line(figures: dict[str, Any]) -> str:
    hidden = ("rows", "traceback", "flops")
    return ", ".join(f"{name} {value}" for name, value in figures.items() if name not in hidden)


def _conclude(options: Options, record: Record) -> str:
    """Write the files; what stands in ``gpu.md``."""
    record.content["targets"] = met_targets(record)
    record.save()
    text = as_markdown(record.content)
    (options.output / "gpu.md").write_text(text)
    return text


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return round(time.perf_counter() - started, 1)


def _seconds_since_start() -> float:
    """Imports included."""
    return round(time.time() - psutil.Process(os.getpid()).create_time(), 1)
