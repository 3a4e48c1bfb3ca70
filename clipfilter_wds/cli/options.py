"""Turns the fields of config dataclasses into options: their types, defaults and help."""

import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, reduce
from operator import or_
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import google
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

#: What an error says that a value must be. The first of these types that an option allows decides.
_EXPECTED = {bool: "true or false", float: "a number", int: "a whole number", Path: "a path", str: "text"}
#: What stands for a value in the help, instead of the option's name.
_METAVARS = {float: "NUMBER", int: "N", Path: "PATH"}
#: Options that have a letter too.
LETTERS = {"-o": "output", "-q": "quiet"}
#: Choices that are longer together, in characters, are named in an option's help alone.
_MAX_CHOICES = 40


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field of a config dataclass.

    Attributes:
        name: The field's: the key in a YAML file, and what follows ``--``.
        hint: The field's type.
        default: The field's; MISSING when there is none.
        help: What the dataclass's docstring says of it, without markup.
        is_positional: Whether ``--name`` may be left out.
    """

    name: str
    hint: Any
    default: Any
    help: str
    is_positional: bool = False

    @cached_property
    def _types(self) -> list[Any]:
        """The types that one value may have."""
        types = () if get_origin(self.hint) is Literal else get_args(self.hint)
        return [kind for kind in types or (self.hint,) if get_origin(kind) is not Sequence]

    @property
    def is_list(self) -> bool:
        """Whether several values may be given."""
        return any(get_origin(kind) is Sequence for kind in get_args(self.hint))

    @property
    def is_flag(self) -> bool:
        """Whether ``--name`` alone means true."""
        return bool in self._types

    @property
    def is_required(self) -> bool:
        """Whether a value must be given."""
        return self.default is MISSING

    @property
    def expected(self) -> str:
        """What an error says that the value must be."""
        if float in self._types and str in self._types:
            return "numbers, separated by commas"
        known = [_EXPECTED[kind] for kind in _EXPECTED if kind in self._types]
        choices = ", ".join(get_args(self._types[0]))
        return " or ".join(filter(None, [choices, known[0]])) if known else f"one of {choices}"

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.name.upper() if self.is_positional else f"--{self.name}"

    @property
    def usage(self) -> str:
        """How it is typed."""
        if not self.is_positional:
            return f"--{self.name} {self.metavar or '|'.join(get_args(self._types[0]))}"
        return f"{self.label} ..." if self.is_list else self.label

    @property
    def wanted(self) -> str:
        """What an error says to type where it is missing."""
        is_unknown_choice = get_args(self._types[0]) and self.metavar == self.name.upper()
        return f"{self.usage}, {self.expected}" if is_unknown_choice else self.usage

    @property
    def metavar(self) -> str | None:
        """What stands for its value in the help; None where the choices do."""
        if known := [_METAVARS[kind] for kind in _METAVARS if kind in self._types]:
            return known[0]
        is_short = len(",".join(get_args(self._types[0]))) in range(1, _MAX_CHOICES + 1)
        return None if is_short else self.name.upper()

    def add_to(self, group: Any) -> None:
        """Make it known to a parser: its type, and its help in a group."""
        settings: dict[str, Any] = {"help": self._described().replace("%", "%%")}
        letters = [letter for letter, name in LETTERS.items() if name == self.name]
        if self.is_flag:
            action = group.add_argument(f"--{self.name}", action=ActionYesNo, **settings)
            action.option_strings = [*letters, *action.option_strings]  # ActionYesNo takes none; for the help alone
            return
        settings["type"] = reduce(or_, self._types)  # for a list's type, jsonargparse would add an option --name+
        if self.is_positional:
            group.add_argument(self.name, nargs="?", metavar=f"{self.usage} or --{self.name}", **settings)
        else:
            settings["metavar"] = self.metavar or f"{{{','.join(get_args(self._types[0]))}}}"
            group.add_argument(*letters, f"--{self.name}", **settings)

    def _described(self) -> str:
        """Its help, with the default where there is one to tell."""
        if any(self.default is nothing for nothing in (MISSING, None, False)):  # 0 is one to tell
            return self.help
        shown = (
            "on" if self.default is True else f"{self.default:g}" if isinstance(self.default, float) else self.default
        )
        return f"{self.help} (default: {shown})"

    def check(self, value: Any, parser: ArgumentParser, where: str = "") -> Any:
        """Convert a value to the option's type.

        Args:
            value: From the command line, as text, or from YAML.
            parser: One that the option was added to.
            where: What follows the value in an error.

        Raises:
            ValueError: When the value has another type.
        """
        if self.is_list and isinstance(value, list):
            return [self.check(one, parser, where) for one in value]
        if Path in self._types and isinstance(value, str) and not value.strip():  # "" would be the current folder
            raise ValueError(f"{self.name} is empty{where}; it must be {self.expected}. Is a variable not set?")
        try:
            return parser.parse_object({self.name: value}, defaults=False)[self.name]
        except ArgumentError:
            raise ValueError(f"{self.name} is {value!r}{where}; it must be {self.expected}") from None


def options_of(config: type, positional: str | None = None) -> list[Option]:
    """The options of a dataclass: required ones first, its own before inherited ones, else as they are documented."""
    hints, defaults = get_type_hints(config), {field.name: field.default for field in fields(config)}
    texts: dict[str, str] = {}
    for ancestor in config.__mro__:
        for param in google.parse(ancestor.__doc__ or "").params:
            texts.setdefault(param.arg_name, plain_text(param.description or ""))
    options = [
        Option(name=name, hint=hints[name], default=defaults[name], help=texts[name], is_positional=name == positional)
        for name in texts
    ]
    return sorted(options, key=lambda option: not option.is_required)


def plain_text(docstring: str) -> str:
    """A docstring's text without its markup."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", docstring).replace("``", "")
    return " ".join(text.split())


def where_is(page: str) -> str:
    """Where a page of the documentation lies: in the copy of the repository that was installed from, if it is there."""
    path = Path(__file__).parents[2] / page
    return str(path) if path.exists() else f"{page} in the repository of the package"


class HelpFormatter(RawDescriptionHelpFormatter):
    """Leaves examples as they are, and names of models in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width, break_on_hyphens=False)
