import multiprocessing
import resource
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.training.loader import ClipFilterLoader
from tests.support.held import Held
from tests.support.processes import in_fresh_process
from tests.support.toys import pair, write_shard, write_tar

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


@pytest.mark.slow
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


# --- one sample ---

MIB = 1 << 20
#: What is said of text: no member of it takes more in a worker.
MAX_TEXT_BYTES = 150 * MIB

JPG = pair(0)["jpg"]
UID = b'{"uid": "' + b"0" * 32 + b'"'
#: Samples whose text is large, and where their captions are.
LARGE_TEXTS = {
    "words": ({"txt": b"a " * (16 * MIB)}, "txt"),
    "blank": ({"txt": b" " * (32 * MIB)}, "txt"),
    "emoji": ({"txt": "\N{CAT} ".encode() * (2 * MIB)}, "txt"),
    "lists": ({"txt": b"a cat", "json": UID + b', "a": [' + b"[]," * (10 * MIB) + b"0]}"}, "txt"),
    "lists, caption": ({"json": b'{"caption": "a cat", "a": [' + b"[]," * (10 * MIB) + b"0]}"}, "json:caption"),
    "lists below the limit": ({"txt": b"a cat", "json": UID + b', "a": [' + b'{"":0},' * 590_000 + b"0]}"}, "txt"),
    "captions": ({"json": b'{"caption": [' + b'"a",' * 1_000_000 + b'"a"]}'}, "json:caption"),
}
REASONS = {"blank": "blank_caption", "lists, caption": "text_too_large", "captions": "text_too_large"}


def grown_bytes(folder: Path, model: str) -> dict[str, int]:
    """By how much the largest of the workers so far exceeds one that reads an ordinary sample."""
    scorer = ClipScorer(model, device="cpu")

    def peak(shard: Path, caption: str) -> int:
        output = folder / shard.stem
        process_shards(ScoreConfig(shards=shard, output=output, caption=caption, num_workers=1), scorer)
        layout = SampleLayout(caption=caption)
        dataset = ClipWebDataset(shard, scorer.preprocess, layout=layout)
        with suppress(StarvationError):  # where the sample can't be used
            list(ClipFilterLoader(dataset, scorer, threshold=None, num_workers=1))
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10

    ordinary = peak(folder / "ordinary.tar", "txt")
    return {name: peak(folder / f"{name}.tar", caption) - ordinary for name, (_, caption) in LARGE_TEXTS.items()}


@pytest.mark.slow
def test_a_worker_takes_little_for_any_text_however_large(clip_folder, tmp_path):
    write_shard(tmp_path / "ordinary.tar", [pair(0)])
    for name, (text, _) in LARGE_TEXTS.items():
        write_tar(tmp_path / f"{name}.tar", [("0.jpg", JPG), *[(f"0.{ext}", data) for ext, data in text.items()]])
    grown = in_fresh_process(grown_bytes, tmp_path, str(clip_folder))
    assert max(grown.values()) < MAX_TEXT_BYTES, {name: num_bytes / MIB for name, num_bytes in grown.items()}
    for name in LARGE_TEXTS:
        assert ShardScores.read(tmp_path / name / f"{name}.parquet").table["reason"].to_pylist() == [REASONS.get(name)]
