"""Everything works where ``/dev/shm`` is small, as it is in containers (64 MB in Docker's)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toys import encoded, make_clip, pair, photo, write_shard

NUM_SAMPLES = 700

#: Runs a command in a mount namespace of its own, whose /dev/shm has this size.
IN_SMALL_SHM = 'mount -t tmpfs -o size="$1" tmpfs /dev/shm && shift && exec "$@"'


def in_small_shm(size: str, *command: object) -> subprocess.CompletedProcess:
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", IN_SMALL_SHM, "sh", size]
    return subprocess.run([*unshare, *map(str, command)], capture_output=True, text=True, check=False, timeout=280)


def is_allowed() -> bool:
    try:
        return in_small_shm("1m", "true").returncode == 0
    except OSError:
        return False


pytestmark = [
    pytest.mark.skipif(not is_allowed(), reason="mount namespaces are not to be had here"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shard, a table of the same pairs, and a model whose views take 150 kB each."""
    folder = tmp_path_factory.mktemp("shm")
    make_clip(folder / "model", image_size=224, patch_size=112, width=32)
    write_shard(folder / "in" / "0.tar", [pair(number) for number in range(NUM_SAMPLES)])
    for seed in range(4):
        (folder / f"{seed}.jpg").write_bytes(encoded(photo(seed)))
    rows = [f"{folder}/{number % 4}.jpg,number {number}" for number in range(NUM_SAMPLES)]
    (folder / "rows.csv").write_text("\n".join(["image,text", *rows]))
    return folder


OPTIONS = ["--device", "cpu", "--num_workers", 8, "--batch_size", 256, "--threshold", 0]


@pytest.mark.parametrize("size", ["64m", "4m"])
@pytest.mark.parametrize("command", ["rewrite", "table"])
def test_a_command_finishes_with_large_batches_and_many_workers(folder, tmp_path, size, command):
    inputs = {
        "rewrite": ["rewrite", folder / "in" / "0.tar", "--output", tmp_path / "out"],
        "table": ["table", folder / "rows.csv", "--output", tmp_path / "out.csv", "--image_key", "image"],
    }
    keys = ["--caption_key", "text"] if command == "table" else []
    program = [sys.executable, "-m", "clipfilter_wds"]
    run = in_small_shm(size, *program, *inputs[command], *keys, "--model", folder / "model", *OPTIONS)
    assert run.returncode == 0, run.stderr
    assert str(NUM_SAMPLES) in run.stdout


LOADER = """
import subprocess, sys
from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset

if __name__ == "__main__":
    scorer = ClipScorer(f"{sys.argv[1]}/model", device="cpu")
    dataset = ClipWebDataset(f"{sys.argv[1]}/in/0.tar", scorer.preprocess)
    loader = ClipFilterLoader(dataset, scorer, threshold=0.0, batch_size=64, score_batch_size=64, num_workers=8)
    batches = iter(loader)
    seen = len(next(batches)["image"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/dev/shm"], check=True)  # where no file can be made
    print(seen + sum(len(batch["image"]) for batch in batches))
"""


@pytest.mark.parametrize("size", ["64m", "4m"])
def test_a_loader_makes_no_file_per_batch(folder, tmp_path, size):
    Path(tmp_path, "script.py").write_text(LOADER)
    run = in_small_shm(size, sys.executable, tmp_path / "script.py", folder)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == str(NUM_SAMPLES)
