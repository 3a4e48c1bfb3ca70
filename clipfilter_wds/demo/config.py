"""Says where the demo writes. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.paths import RemotePath, any_path
from clipfilter_wds.storage.publish import check_writable


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Output of ``demo``.

    Attributes:
        output: Folder to write to. One that an earlier demo wrote is used again; other files in the places of the
            demo's are never replaced.

    Raises:
        ValueError: When it can't be written, or is not on this machine.
    """

    output: str | Path = "clipfilter_demo"

    def __post_init__(self) -> None:
        check_writable(self.folder)

    @property
    def folder(self) -> Path:
        """The output folder."""
        folder = any_path(self.output)
        if isinstance(folder, RemotePath):
            shown = without_secrets(str(self.output))
            raise ValueError(f"output {shown!r} is not on this machine, where the demo writes; name a local folder")
        return folder
