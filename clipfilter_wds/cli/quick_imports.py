"""Has a program that imports much start sooner."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import in this block, and never look for garbage in it or, afterwards, among what was imported.

    Of three thousand modules nothing is garbage, and to look through them again and again takes a third of the time
    until the command begins.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
