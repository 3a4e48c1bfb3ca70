"""What C libraries write of odd images is kept from the terminal, and nothing else is."""

import struct
import subprocess
import sys

import pytest

from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.types import DropReason
from tests.support.toys import encoded, photo, write_shard


def odd_tiffs() -> list[bytes]:
    """Of which libtiff says that it can't decode them, and Pillow that they have too many channels."""
    torn = bytearray(encoded(photo(0), "TIFF", compression="tiff_adobe_deflate"))
    start = torn.index(b"x\x9c") + 20
    torn[start : start + 20] = bytes(20)
    plain = encoded(photo(0), "TIFF")
    samples_per_pixel = struct.pack("<HHI", 277, 3, 1)
    return [bytes(torn), plain.replace(samples_per_pixel + b"\3", samples_per_pixel + b"\x0b")]


def test_a_shard_of_bad_images_writes_nothing(scorer, tmp_path, capfd):
    shard = write_shard(tmp_path / "0.tar", [{"tif": data, "txt": b"a"} for data in odd_tiffs()] * 20)
    lines = {}
    for num_workers in (0, 1):
        config = ScoreConfig(shards=shard, output=tmp_path / f"out{num_workers}", num_workers=num_workers)
        assert process_shards(config, scorer).counts.dropped == {DropReason.UNREADABLE_IMAGE: 40}
        lines[num_workers] = capfd.readouterr().err.splitlines()
    assert sum("ZIPDecode" in line for line in lines[0]) == 20  # else there would be nothing to keep off
    assert lines[1] == []


SCRIPT = """
import ctypes, faulthandler, logging, os, sys, threading, warnings

from torch.utils.data import IterableDataset

from clipfilter_wds.workers.crashes import CrashTracker, WorkerDiedError
from clipfilter_wds.workers.pool import worker_loader

logging.basicConfig()
faulthandler.enable()


class Speaking(IterableDataset):
    def __init__(self, tracker):
        self.tracker = tracker

    def __iter__(self):
        yield 0
        os.write(2, b"library outside\\n")
        worker = self.tracker.for_worker()
        for index in range(2):
            with worker.at("a.tar", index):
                for _ in range(20_000):
                    os.write(2, b"library inside" + bytes(50) + b"\\n")
                print("print inside", file=sys.stderr)
                print("print to the first", file=sys.__stderr__)
                logging.getLogger("somebody").warning("log inside")
                warnings.warn("warning inside")
                thread = threading.Thread(target=lambda: 1 / 0)
                thread.start()
                thread.join()
        os.write(2, b"library after\\n")
        yield 1
        with worker.at("a.tar", 7):
            ctypes.string_at(0)


if __name__ == "__main__":
    tracker = CrashTracker(["a.tar"], 1)
    loader = worker_loader(Speaking(tracker), num_workers=1, tracker=tracker, multiprocessing_context=sys.argv[1])
    try:
        for number in loader:
            print(number)
    except WorkerDiedError as error:
        print(error)
"""


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
def test_all_that_python_writes_comes_and_all_that_is_written_between_two_samples(method, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", method], capture_output=True, text=True, check=True, timeout=200
    )
    *numbers, death = done.stdout.splitlines()
    assert numbers[0] == "0"  # the last may be lost with the worker
    assert death.startswith("a worker process died (SIGSEGV) at sample 7 of ")
    assert "library inside" not in done.stderr
    expected = {
        "library outside": 1,
        "library after": 1,
        "print inside": 2,
        "print to the first": 2,
        "WARNING:somebody:log inside": 2,
        "UserWarning: warning inside": 1,
        "ZeroDivisionError": 2,
        "Fatal Python error: Segmentation fault": 1,
    }
    assert {text: done.stderr.count(text) for text in expected} == expected, done.stderr


FILE_SCRIPT = """
import sys

file = open(sys.argv[1], "w")
print(file.fileno())

from torch.utils.data import IterableDataset

from clipfilter_wds.workers.crashes import CrashTracker
from clipfilter_wds.workers.pool import worker_loader


class Writing(IterableDataset):
    def __init__(self, tracker):
        self.tracker = tracker

    def __iter__(self):
        with self.tracker.for_worker().at("a.tar", 0):
            print("written while a sample is decoded", file=file, flush=True)
        yield 0


tracker = CrashTracker(["a.tar"], 1)
list(worker_loader(Writing(tracker), num_workers=1, tracker=tracker, multiprocessing_context="fork"))
"""


def test_where_there_is_no_stderr_workers_leave_the_file_alone_that_has_its_number(tmp_path):
    (tmp_path / "script.py").write_text(FILE_SCRIPT)
    command = f"exec '{sys.executable}' '{tmp_path}/script.py' '{tmp_path}/file' 2>&-"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, check=True, timeout=100)
    assert done.stdout == "2\n"
    assert (tmp_path / "file").read_text() == "written while a sample is decoded\n"
