"""Many samples through the real command, watched from outside: what it holds must not grow with their number."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from clipfilter_wds.workers.cpus import num_cpus
from tests.support.held import Held
from tests.support.toys import encoded, make_clip, photo, write_shard

#: By hand, with more memory to lose: CLIPFILTER_LONG_RUN=1000000.
NUM_SAMPLES = int(os.environ.get("CLIPFILTER_LONG_RUN", "100000"))
SHARD_SIZE = 1_000
NUM_WORKERS = 2
SECONDS_BETWEEN_LOOKS = 0.25

#: Shares of the run whose medians are told. The last one ends before the workers do, who go when all has been read.
EARLY, MIDDLE, LATE = (0.1, 0.2), (0.45, 0.55), (0.85, 0.97)

#: What a run may have more of at its end than at a tenth: some for a heap that wears, and batches on their way.
_MEMORY_MARGIN, _SHARED_MARGIN = 8 << 20, 4 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what memory is whose")


def watch(command: subprocess.Popen, num_done: "NumDone") -> Iterator[tuple[float, Held]]:
    """Now and then until the command ends: the share of the run that is done, and what is held."""
    root = psutil.Process(command.pid)
    while command.poll() is None:
        with suppress(psutil.NoSuchProcess, OSError):  # a process came or went
            yield num_done.share(), Held.by(root)
        time.sleep(SECONDS_BETWEEN_LOOKS)


@dataclass(frozen=True)
class NumDone:
    """Counts commit marks."""

    output: Path
    num_shards: int

    def share(self) -> float:
        return len(list(self.output.glob("*_stats.json"))) / self.num_shards


def write_shards(folder: Path) -> list[Path]:
    """One shard under many names: ten tiny images, a hundred captions of different lengths."""
    images = [encoded(photo(seed, (8, 8)), "PNG") for seed in range(10)]
    captions = [f"photo{' of something' * (seed % 4)} {seed}".encode() for seed in range(100)]
    samples = [{"png": images[number % 10], "txt": captions[number % 100]} for number in range(SHARD_SIZE)]
    first = write_shard(folder / "000000.tar", samples)
    others = [first.with_name(f"{number:06d}.tar") for number in range(1, NUM_SAMPLES // SHARD_SIZE)]
    for other in others:
        other.hardlink_to(first)
    return [first, *others]


@pytest.mark.slow
@pytest.mark.timeout(300 + NUM_SAMPLES // 100)
def test_a_long_rewrite_holds_no_more_at_its_end_than_at_a_tenth_of_it(tmp_path):
    clip = make_clip(tmp_path / "clip", image_size=8, patch_size=8, width=8)
    shards = write_shards(tmp_path / "in")
    output = tmp_path / "out"
    output.mkdir()
    command = [sys.executable, "-m", "clipfilter_wds", "rewrite", f"{tmp_path}/in/*.tar", "--output", str(output)]
    command += ["--model", str(clip), "--threshold", "0.1", "--device", "cpu", "--num_workers", str(NUM_WORKERS)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            looks = list(watch(process, NumDone(output, len(shards))))
        finally:
            process.kill()
    assert process.wait() == 0, (tmp_path / "log").read_text()
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["seen"], summary["failed_shards"]) == (len(shards) * SHARD_SIZE, {})
    assert 0.2 < summary["kept"] / summary["seen"] < 0.9

    early, middle, late = (
        Held.median_of([held for share, held in looks if begin <= share < end]) for begin, end in (EARLY, MIDDLE, LATE)
    )
    print(f"\n{summary['seen']:,} samples, {summary['samples_per_second']} samples/s, {len(looks)} looks")
    print(f"{EARLY}: {early}\n{MIDDLE}: {middle}\n{LATE}: {late}")
    num_writers = min(num_cpus(), 4)
    assert late.num_processes == early.num_processes == 1 + NUM_WORKERS + num_writers
    assert late.mapped <= early.mapped + _MEMORY_MARGIN
    assert late.shared_memory <= early.shared_memory + _SHARED_MARGIN
    assert late.num_shared <= early.num_shared + 8
    assert late.num_files <= early.num_files + 4
    assert late.num_threads <= early.num_threads
    shutil.rmtree(output)  # gigabytes, of the longest
