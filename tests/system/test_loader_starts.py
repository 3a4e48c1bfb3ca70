"""Many starts and stops of a loader, of all kinds: what a process holds must not grow with them."""

import gc
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.processes import in_fresh_process
from tests.support.restore import Recipe, write_numbered


@dataclass(frozen=True)
class Held:
    """What this process and its children hold."""

    own_bytes: int
    num_files: int
    num_threads: int
    num_children: int
    shared_bytes: int

    @classmethod
    def now(cls) -> "Held":
        this = psutil.Process()
        processes = [this, *this.children(recursive=True)]
        return cls(
            own_bytes=sum(process.memory_full_info().uss for process in processes),
            num_files=sum(process.num_fds() for process in processes),
            num_threads=threading.active_count(),
            num_children=len(processes) - 1,
            shared_bytes=sum(map(_shared_bytes, processes)),
        )


def _shared_bytes(process: psutil.Process) -> int:
    """Of tensors on their way between processes."""
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps if "/dev/shm/" in line or "/torch_" in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in ranges)


def start_and_stop(recipe: Recipe, num_times: int) -> tuple[Held, Held]:
    """What is held after some starts and stops of all kinds, and after many."""
    loader = recipe.build(num_workers=1)

    def once(number: int) -> None:
        match number % 4:
            case 0:  # broken off at the first batch
                for _ in loader:
                    break
            case 1:  # made, and never asked for a batch
                iter(loader)
            case 2:  # given up in an exception
                try:
                    for _ in loader:
                        raise LookupError
                except LookupError:
                    pass
            case 3:  # let go of between two batches, and begun anew elsewhere
                iterator = iter(loader)
                next(iterator)
                del iterator
                loader.set_epoch(number)

    for number in range(20):
        once(number)
    gc.collect()
    before = Held.now()
    for number in range(num_times):
        once(number)
    gc.collect()
    return before, Held.now()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_hundred_starts_and_stops_leak_nothing(clip_folder, tmp_path):
    shards = write_numbered(tmp_path / "in", [list(range(40))])
    recipe = Recipe(clip=clip_folder, shards=shards, loader={"threshold": None, "batch_size": 4, "score_batch_size": 4})
    before, after = in_fresh_process(start_and_stop, recipe, 500, timeout=800)
    assert after.num_children == before.num_children == 0
    assert after.num_threads <= before.num_threads
    assert after.num_files <= before.num_files
    assert after.shared_bytes <= before.shared_bytes
    assert after.own_bytes < before.own_bytes + (20 << 20)
