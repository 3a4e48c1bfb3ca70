"""Refuses scores that were made in another way."""

import json
from collections.abc import Mapping
from typing import Any

from clipfilter_wds.scores.kind import COSINE

Fingerprint = Mapping[str, Any]

#: Entries that older files lack, and what they stand for there.
_IMPLIED = {"score": COSINE}


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
    found, expected = {**_IMPLIED, **found}, {**_IMPLIED, **expected}
    names = [name for name in {**expected, **found} if name != "model" and found.get(name) != expected.get(name)]
    if "weights" in names and found.get("model") != expected.get("model"):
        names = ["model", *names]
    if names:
        differences = "; ".join(
            f"{name} {_short(found.get(name))} there, {_short(expected.get(name))} here" for name in names
        )
        raise ValueError(f"{what} was written with other settings ({differences}){cure and f'; {cure}'}")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] + "…" if len(text) == 64 else text
