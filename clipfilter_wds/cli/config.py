"""Says what a command shows. Imports nothing."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """What is shown.

    Attributes:
        quiet: Print nothing but errors.
    """

    quiet: bool = False
