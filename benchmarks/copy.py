"""Copying what is kept, from score tables made before, beside ``cp`` on the same files and disk."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from benchmarks.options import Options
from benchmarks.report import Report
from benchmarks.rounds import Spread, ratios
from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import SampleRow

#: 5.4 GB: more than a system leaves lying in memory for the disk, so that cp has to write as well.
_NUM_SHARDS, _SAMPLES_PER_SHARD, _IMAGE_BYTES = 48, 2000, 50_000
_SHARES = {"rewrite, all kept": 1.0, "rewrite, a third kept": 0.3}


def copy(options: Options, report: Report) -> None:
    """Bytes of input per second: cp, cp that waits for the disk as rewrite does, rewrites that keep more or less."""
    with tempfile.TemporaryDirectory(dir=options.output) as name:
        shards, scores, out = (Path(name) / folder for folder in ("shards", "scores", "out"))
        num_bytes = _write(shards, scores)

        def rewrite(share: float) -> None:
            threshold = 1.0 - share  # scores are even
            process_shards(RewriteConfig(shards=f"{shards}/*.tar", output=out, scores=scores, threshold=threshold))

        turns: dict[str, Callable[[], None]] = {
            "cp": lambda: _cp(shards, out),
            "cp, fsync": lambda: _cp_synced(shards, out),
        }
        turns |= {name: (lambda share=share: rewrite(share)) for name, share in _SHARES.items()}
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(options.turns() + 1):  # the first one is not counted
            for name, turn in turns.items():
                shutil.rmtree(out, ignore_errors=True)
                _cp(shards, out)  # so that all find as much memory free, and as lately used, whoever came before
                shutil.rmtree(out)
                os.sync()  # nobody pays for what another has written
                started = time.perf_counter()
                turn()
                rate = num_bytes / (time.perf_counter() - started)
                if number:
                    rates[name].append(rate / 1e6)
                    report.tell(f"round {number}/{options.turns()}  {name}: {rate / 1e6:,.0f} MB/s")
    rows = [
        {
            "name": name,
            "rate": Spread.of(rates[name]),
            "to cp": ratios(rates[name], rates["cp"]),
            "to fsync": ratios(rates[name], rates["cp, fsync"]),
        }
        for name in rates
    ]
    report.table("Copying", {"": "name", "MB/s of input": "rate", "to cp": "to cp", "to cp, fsync": "to fsync"}, rows)
    report.add("copy", rows=rows, bytes=num_bytes)


def _write(shards: Path, scores: Path) -> int:
    """Shards as img2dataset's, with random bytes for images, and score tables; the size of the shards."""
    shards.mkdir()
    scores.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(_NUM_SHARDS):
        path = shards / f"{shard:05d}.tar"
        keys = [f"{shard * _SAMPLES_PER_SHARD + number:09d}" for number in range(_SAMPLES_PER_SHARD)]
        with webdataset.TarWriter(str(path)) as tar:  # img2dataset's, with a header for the time of each member
            for key in keys:
                record = {"key": key, "uid": rng.bytes(16).hex(), "url": "u" * 100, "exif": "e" * 300}
                tar.write({"__key__": key, "jpg": rng.bytes(_IMAGE_BYTES), "json": record, "txt": "c" * 80})
        metadata = ScoreMetadata(
            shard=str(path),
            num_bytes=path.stat().st_size,
            num_samples=len(keys),
            torn=False,
            fingerprint={"model": "none", "precision": "fp32"},
        )
        table = ShardScores.from_rows(
            SampleRows.of(SampleRow(key, index) for index, key in enumerate(keys)),
            rng.permutation(np.linspace(0, 1, len(keys), dtype=np.float32)),
            metadata,
        )
        with (scores / f"{shard:05d}.parquet").open("wb") as file:
            table.write(file)
    return sum(path.stat().st_size for path in shards.iterdir())


def _cp(shards: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(shards), str(out)], check=True)


def _cp_synced(shards: Path, out: Path) -> None:
    _cp(shards, out)
    subprocess.run(["sync", *map(str, out.iterdir()), str(out)], check=True)
