"""Makes images whose decoder does harm to the process that it runs in."""

import ctypes
import os
import re
import signal
from pathlib import Path

from PIL import PpmImagePlugin

from tests.support.toys import pair, write_shard


def segfault() -> None:
    ctypes.string_at(0)


def out_of_memory() -> None:
    """What the system does to a process when there is none left."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(0)


def loop_in_c() -> None:
    """An endless loop that no Python code can break."""
    re.match(r"(a|aa)+$", "a" * 100 + "b")


def loop() -> None:
    while True:
        pass


#: A PPM with this comment is decoded by none of Pillow's own decoders.
EVIL = b"P6 # evil %d\n8 8 255\n" + bytes(3 * 8 * 8)


class EvilImageFile(PpmImagePlugin.PpmImageFile):
    """A Pillow plug-in whose decoder does harm to the process that it runs in."""

    harm = staticmethod(segfault)
    tries: Path

    def load(self):
        if self.fp is not None and b"evil" in self.fp.getvalue()[:10]:
            with self.tries.open("a") as file:
                file.write("x")
            self.harm()
        return super().load()


def write_shards(folder: Path, evil: dict[int, set[int]], num_shards: int = 3, num_samples: int = 20) -> None:
    """Shards of pairs, some samples of which are evil."""
    for shard in range(num_shards):
        samples = [pair(100 * shard + number) for number in range(num_samples)]
        for number in evil.get(shard, ()):
            samples[number] = {"ppm": EVIL % number, "txt": b"a photo"}
        write_shard(folder / f"{shard}.tar", samples)
