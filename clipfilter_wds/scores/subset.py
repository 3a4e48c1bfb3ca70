"""Reads lists of samples that may be kept: DataComp's uid arrays, or keys in a text file."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipfilter_wds.storage.text import read_lines

#: DataComp's type of a uid: the two halves of its 32 hexadecimal digits.
UID = np.dtype("u8,u8")
_CHECKED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Subset:
    """The samples that a file lists.

    Pickled, it is the path only; each process opens and checks the file for itself, once.

    Attributes:
        path: A ``.npy`` file as DataComp's subsets are: a sorted one-dimensional array of ``u8,u8``, the halves of
            samples' uids, which is mapped into memory and never loaded. Any other file is a list of keys
            (``__key__``) in UTF-8, one per line without the blanks around it, and is held in memory.

    Raises:
        ValueError: When the file is neither.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).expanduser())
        try:
            if self.by_uid:
                _check_sorted(self._uids, self.path)
            elif not self._keys:
                raise ValueError(f"subset {str(self.path)!r} lists no key; it should hold one per line")
        except OSError as error:
            raise ValueError(f"can't read subset {str(self.path)!r}: {error.strerror or error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.path,)

    @property
    def by_uid(self) -> bool:
        """Whether it lists uids, not keys."""
        return self.path.suffix == ".npy"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def describe(self) -> str:
        """How many samples it lists, and where."""
        number = len(self._uids) if self.by_uid else len(self._keys)
        return f"{number:,} {'uids' if self.by_uid else 'keys'} in {str(self.path)!r}"

    def holds(self, keys: Sequence[str], uids: Sequence[bytes | None]) -> np.ndarray:
        """Whether the samples with these keys and uids (16 bytes, big-endian) are listed, bool ``[N]``."""
        if not self.by_uid:
            return np.fromiter((key in self._keys for key in keys), dtype=bool, count=len(keys))
        known = np.array([uid is not None for uid in uids], dtype=bool)
        wanted = np.frombuffer(b"".join(uid for uid in uids if uid is not None), dtype=">u8,>u8").astype(UID)
        known[known] = _are_in(self._uids, wanted)
        return known

    @cached_property
    def _uids(self) -> np.ndarray:
        try:
            uids: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"subset {str(self.path)!r} is no numpy array of uids: {error}") from None
        if uids.dtype != UID or uids.ndim != 1:
            raise ValueError(
                f"subset {str(self.path)!r} is an array of {uids.dtype} with {uids.ndim} dimensions; it should have "
                "one, and be of 'u8,u8' (the two halves of each uid)"
            )
        return uids

    @cached_property
    def _keys(self) -> frozenset[str]:
        lines = read_lines(self.path, "subset", hint="a list of uids should be a .npy file")
        return frozenset(filter(None, map(str.strip, lines)))


def _are_in(listed: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    if not len(listed):
        return np.zeros(len(wanted), dtype=bool)
    at = np.minimum(np.searchsorted(listed, wanted), len(listed) - 1)
    found: np.ndarray = listed[at] == wanted
    return found


def _check_sorted(uids: np.ndarray, path: Path) -> None:
    for start in range(0, len(uids) - 1, _CHECKED_AT_ONCE):
        piece = uids[start : start + _CHECKED_AT_ONCE + 1]  # and the first of the next piece
        high, low = piece["f0"], piece["f1"]
        ascends = (high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] <= low[1:]))
        if not ascends.all():
            raise ValueError(
                f"subset {str(path)!r} is not sorted from index {start + int(ascends.argmin())} on; np.sort it"
            )


@cache
def _opened(path: Path) -> Subset:
    return Subset(path)
