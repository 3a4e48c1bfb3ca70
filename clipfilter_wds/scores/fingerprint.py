"""Refuses scores that were made in another way."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from clipfilter_wds.scores.kind import COSINE

Fingerprint = Mapping[str, Any]

#: Entries that older files lack, and what they stand for there.
_IMPLIED = {"score": COSINE, "resize_on_device": False}

#: Characters that an error shows of a value.
_MOST_SHOWN = 100


def check_fingerprint(found: Fingerprint, expected: Fingerprint, what: str, cure: str = "") -> None:
    """Refuse scores that were made in another way. The model's name may differ as long as its weights don't.

    Args:
        found: What the scores depend on.
        expected: What they should depend on.
        what: What holds the scores.
        cure: What to do about it.

    Raises:
        ValueError: Naming the differing entries with both values.
    """
    differences = dict(_differences({**_IMPLIED, **found}, {**_IMPLIED, **expected}))
    models = differences.pop("model", None)
    if models is not None and "weights" in differences:
        differences = {"model": models, **differences}
    if differences:
        shown = "; ".join(
            f"{name} {_short(there)} there, {_short(here)} here" for name, (there, here) in differences.items()
        )
        raise ValueError(f"{what} was written with other settings ({shown}){cure and f'; {cure}'}")


def _differences(found: Fingerprint, expected: Fingerprint) -> Iterator[tuple[str, tuple[object, object]]]:
    """The entries that differ, those within others by their path, and both values."""
    for name in {**expected, **found}:
        there, here = found.get(name), expected.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from ((f"{name}.{inner}", values) for inner, values in _differences(there, here))
        elif there != here:
            yield name, (there, here)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", text)  # hashes
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "…"
