import multiprocessing
import threading
from contextlib import suppress

import psutil
import torch

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from tests.support.held import Held
from tests.support.toys import pair, write_shard

context = multiprocessing.get_context("forkserver")


def peak_bytes(shards: list[str], output: str, model: str, result) -> None:
    """Send the highest sum of this process's and its workers' memory while it scores the shards.

    What they share since the fork counts for each, so that a page makes no difference when it is copied at last.
    """
    torch.set_num_threads(1)
    scorer, done, peak = ClipScorer(model, device="cpu"), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        this = psutil.Process()
        while not done.wait(0.02):
            with suppress(psutil.NoSuchProcess, OSError):  # a worker came or went
                peak = max(peak, Held.by(this).mapped)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process_shards(ScoreConfig(shards=shards, output=output, num_workers=2, batch_size=16), scorer)
    done.set()
    watcher.join()
    result.send(peak)


def test_memory_does_not_grow_with_the_number_of_shards(clip_folder, tmp_path):
    shards = [write_shard(tmp_path / "in" / f"{n:03d}.tar", [pair(n * 20 + i) for i in range(20)]) for n in range(200)]
    peaks = {}
    for num_shards in (20, 200):
        receive, send = context.Pipe()
        urls, output = [str(shard) for shard in shards[:num_shards]], str(tmp_path / f"out{num_shards}")
        process = context.Process(target=peak_bytes, args=(urls, output, str(clip_folder), send))
        process.start()
        peaks[num_shards] = receive.recv()
        process.join()
        assert process.exitcode == 0
    assert peaks[200] < 1.1 * peaks[20], peaks
