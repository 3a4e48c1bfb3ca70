"""Measures how many images a second the machine's cores decode and resize, which bounds a run from end to end."""

import multiprocessing
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.material import make_model
from clipfilter_wds import ClipScorer
from clipfilter_wds.preprocess.clip import ClipPreprocess


def decoding(bench: Bench) -> dict[str, Any]:
    """Samples per second of one process, and of as many as decode in a run."""
    model = make_model(bench.options.cache, "tiny-224")  # sees images as the others do
    preprocess, found = ClipScorer(model, device="cpu").preprocess, {}
    for image_size in bench.scale.drawn:
        jpegs = [image.read_bytes() for image in {image for image, _ in bench.data(image_size).rows}]
        for name, processes in (("one", 1), ("all", bench.options.workers)):
            found[f"{image_size} px, {name}"] = round(_rate(jpegs, preprocess, processes, 5 * bench.scale.seconds))
    return {**found, "processes": bench.options.workers}


def _rate(jpegs: Sequence[bytes], preprocess: ClipPreprocess, num_processes: int, seconds: float) -> float:
    context = multiprocessing.get_context("fork")
    ready, begin = context.Semaphore(0), context.Event()
    counts = context.Array("q", num_processes, lock=False)

    def decode(number: int) -> None:
        torch.set_num_threads(1)
        ready.release()
        begin.wait()
        until, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < until:
            preprocess.open_pair(jpegs[count % len(jpegs)], "a caption of a few words")
            count += 1
        counts[number] = count

    processes = [context.Process(target=decode, args=(number,), daemon=True) for number in range(num_processes)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    begin.set()
    for process in processes:
        process.join()
    return sum(counts) / seconds
