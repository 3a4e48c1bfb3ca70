"""Says where the demo writes. Imports nothing."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Output of ``demo``.

    Attributes:
        output: Folder to write to.
    """

    output: str | Path = "clipfilter_demo"
