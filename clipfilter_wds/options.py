"""Names the option that a misspelt one means."""

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any


def check_options(owner: str, given: Iterable[str], config: type) -> None:
    """Check that every option is a field of the dataclass that holds them.

    Raises:
        TypeError: When one is not, with the name that it may mean.
    """
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f"; it has {', '.join(known)}"
            raise TypeError(f"{owner} has no option {name!r}{hint}")


def did_you_mean(name: str, known: Iterable[str], shown: str = "{!r}") -> str:
    """What to add to an error about a name that is not known: the one that is most alike, or nothing."""
    alike = get_close_matches(name, list(known), n=1)
    return f"; did you mean {shown.format(alike[0])}?" if alike else ""


def changed_options(config: Any, always: Iterable[str] = ()) -> str:
    """The fields of a dataclass that are not at their defaults, and those that are ``always`` shown: ``a=1, b='c'``."""
    shown = [
        field.name for field in fields(config) if field.name in always or getattr(config, field.name) != field.default
    ]
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in shown)
