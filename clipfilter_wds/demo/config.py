"""Says where the demo writes. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from clipfilter_wds.storage.publish import check_writable


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Output of ``demo``.

    Attributes:
        output: Folder to write to. One that an earlier demo wrote is used again; other files in the places of the
            demo's are never replaced.

    Raises:
        ValueError: When it can't be written.
    """

    output: str | Path = "clipfilter_demo"

    def __post_init__(self) -> None:
        check_writable(Path(self.output).expanduser())
