"""Time and peak memory of a rewrite as the number of samples grows, with the tiny model."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks.options import Options
from benchmarks.report import Report, growth

_SHARD_SAMPLES = 1024
_NUM_SHARDS = (1, 2, 4, 8, 16, 32, 64)
_IMAGE_SIZE = 64


def length(options: Options, report: Report) -> None:
    """Run the command on 1,024 to 65,536 samples; up to ``num_samples``, if that is fewer than usual."""
    tiny = replace(options, size="tiny", image_size=_IMAGE_SIZE, num_samples=min(_SHARD_SAMPLES, options.num_samples))
    rows = []
    for number in _NUM_SHARDS if options.num_samples >= _SHARD_SAMPLES // 4 else _NUM_SHARDS[:2]:
        seconds, peak = _rewrite(tiny, number)
        samples = number * tiny.num_samples
        rows.append({"samples": samples, "seconds": round(seconds, 2), "peak": round(peak / 2**20)})
        rows[-1]["microseconds"] = round(1e6 * seconds / samples)
        report.tell(f"{samples:,} samples: {seconds:.1f} s, {peak / 2**20:,.0f} MiB")
    report.table(
        f"rewrite, tiny model, {_IMAGE_SIZE}-pixel JPEGs, {tiny.workers} workers",
        {"samples": "samples", "s": "seconds", "us per sample": "microseconds", "peak MiB of all processes": "peak"},
        rows,
    )
    report.plot("length", lambda axes: growth(axes, rows))
    report.add("length", rows=rows)


def _rewrite(options: Options, num_shards: int) -> tuple[float, int]:
    """Seconds, without loading the model, and peak memory in bytes."""
    shard = options.data().shards[0]
    with tempfile.TemporaryDirectory(dir=options.cache) as folder:
        shards, output = Path(folder, "shards"), Path(folder, "output")
        shards.mkdir()
        for number in range(num_shards):
            os.link(shard, shards / f"{number:05d}.tar")
        command = [sys.executable, "-m", "clipfilter_wds", "rewrite", f"{shards}/*.tar", f"--output={output}"]
        command += [f"--model={options.model}", f"--device={options.device}", f"--num_workers={options.workers}"]
        command += [f"--batch_size={options.batch_size}", "--threshold=0.1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peak = _peak_until_done(psutil.Process(process.pid), process)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        return json.loads((output / "summary.json").read_text())["seconds"], peak


def _peak_until_done(root: psutil.Process, process: subprocess.Popen) -> int:
    """The most memory that the processes of a tree hold for themselves (USS), looked at ten times a second."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, _unshared(root))
        time.sleep(0.1)
    return peak


def _unshared(root: psutil.Process) -> int:
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().uss
    except psutil.NoSuchProcess:  # one of them has just ended
        return 0
    return total
