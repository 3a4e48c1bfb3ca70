"""Keeps the figures of all parts in ``gpu.json``, which the next call reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Keys of what is kept of a part in place of its figures.
FAILED, LEFT_OUT = "failed", "left_out"


class Record:
    """The figures of the parts that are done.

    Args:
        folder: Where ``gpu.json`` is.
        conditions: Machine and scale. What was measured under others is not added to.

    Raises:
        SystemExit: When the folder has figures of another machine or scale.
    """

    def __init__(self, folder: Path, conditions: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "gpu.json"
        self.content: dict[str, Any] = {"conditions": dict(conditions), "phases": [], "parts": {}, "targets": []}
        if not self._path.is_file():
            return
        found = json.loads(self._path.read_text())
        if found["conditions"] != self.content["conditions"]:
            raise SystemExit(
                f"{self._path} was measured with {found['conditions']}, and this is {self.content['conditions']}; "
                "choose another --output, or delete it"
            )
        self.content = found

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """By name."""
        parts: dict[str, dict[str, Any]] = self.content["parts"]
        return parts

    def is_done(self, part: str) -> bool:
        """Whether its figures are there."""
        return part in self.parts and not {FAILED, LEFT_OUT} & self.parts[part].keys()

    def figure(self, part: str, name: str) -> Any:
        """A figure of a part that is done; None of one that is not."""
        return self.parts[part].get(name) if self.is_done(part) else None

    def save(self) -> None:
        """Write the file."""
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self._path)
