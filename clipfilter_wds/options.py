"""Checks options: names the one that a misspelt one means, and takes numbers for what they are."""

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral, Real
from os import PathLike
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


def plain(value: Any) -> Any:
    """The number of a numpy scalar, or of a tensor of one, so that what is saved holds plain values only."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_number(name: str, value: Any) -> None:
    """Check an option that measures.

    Raises:
        TypeError: When it is no number, such as text from a file of settings.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")


def check_whole_number(name: str, value: Any, at_least: int) -> None:
    """Check an option that counts.

    Raises:
        TypeError: When it is no whole number.
        ValueError: When it is too small.
    """
    if type(value) is bool or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}; it must be a whole number")
    if value < at_least:
        raise ValueError(f"{name} is {value}; it must be at least {at_least}")


def refuse_name(option: str, value: Any, instead: str) -> None:
    """Refuse the name of something where the thing itself is asked for.

    Raises:
        TypeError: Saying what to give instead.
    """
    if isinstance(value, str | PathLike):
        raise TypeError(f"{option} is {str(value)!r}; give {instead}")
