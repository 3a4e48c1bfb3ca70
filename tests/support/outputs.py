"""Runs `rewrite` in this process, and checks what it wrote."""

import contextlib
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import pytest

from clipfilter_wds.cli import main

THRESHOLD = 0.12  # about the median score of the random model on these pairs


def run(scorer, shards, output, **options) -> dict:
    """Run the command; its summary. Arguments that it refuses are a ValueError with its message."""
    options = {"threshold": THRESHOLD, "batch_size": 8, "num_workers": 0, **options}
    named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    shards = ",".join(map(str, shards)) if isinstance(shards, list) else str(shards)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main(["rewrite", shards, "--output", str(output), "--model", scorer.model_name, "--device", "cpu", *named])
    if ended.value.code == 2:
        raise ValueError(said.getvalue())
    summary = json.loads((output / "summary.json").read_bytes())
    assert ended.value.code == bool(summary["failed_shards"])
    return summary


def bits(folder: Path) -> dict[str, str]:
    """Digest of every file, but for the summary, which tells the time taken."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "summary.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_accounting(folder: Path) -> dict:
    """Every stats file and the summary close; the summary is the sum of the stats. Returns the summary."""
    summary = json.loads((folder / "summary.json").read_bytes())
    all_stats = [json.loads(path.read_bytes()) for path in folder.rglob("*_stats.json")]
    for record in [summary, *all_stats]:
        assert record["seen"] == record["kept"] + sum(record["dropped"].values())
    assert summary["seen"] == sum(stats["seen"] for stats in all_stats)
    assert summary["dropped"] == dict(sum((Counter(stats["dropped"]) for stats in all_stats), Counter()))
    for stats in all_stats:
        tar = folder / stats["shard"]
        assert tar.exists() == (stats["kept"] > 0)
        if stats["kept"]:
            assert hashlib.sha256(tar.read_bytes()).hexdigest() == stats["sha256"]
    return summary


def rewrite(command, clip_folder, shards, output, *options) -> tuple[int, str]:
    """Rewrite shards with the ``command`` fixture, dropping only what can't be scored: exit code, and all it showed."""
    defaults = ("--model", clip_folder, "--device", "cpu", "--threshold", 0, "--num_workers", 0)
    return command("rewrite", shards, "--output", output, *defaults, *options)
