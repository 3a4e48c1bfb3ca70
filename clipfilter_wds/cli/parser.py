"""Reads a command's options from its arguments and YAML files; what is typed always wins."""

import json
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from clipfilter_wds.cli.options import LETTERS, HelpFormatter, Option, options_of, plain_text, where_is
from clipfilter_wds.options import did_you_mean


@dataclass(frozen=True, kw_only=True)
class _FilesConfig:
    """Other options.

    Attributes:
        config: YAML file with any of these options. What is typed wins over it, and of several files the last one wins.
    """

    config: Path | Sequence[Path] | None = None


[_CONFIG] = options_of(_FilesConfig)

#: A key, or the dash of a list, before a text that begins with a sign of YAML's own.
_UNQUOTED = re.compile(r"\s*((?:- |[\w-]+:)\s*)([@*{&%!`|>].*?)\s*$")


class CommandParser:
    """The options of a command.

    Args:
        prog: How the command is called.
        description: What it does.
        examples: Calls of it.
        page: The page of the documentation that is about it.
        configs: The dataclasses whose fields are the options; each is a group in the help.
        positional: The option whose ``--name`` may be left out.
        owners: Which commands have the option of that name.
    """

    def __init__(
        self,
        prog: str,
        *,
        description: str,
        examples: Sequence[str],
        page: str,
        configs: Sequence[type],
        positional: str | None = None,
        owners: Callable[[str], Sequence[str]] = lambda _: (),
    ) -> None:
        self.groups = {config: options_of(config, positional) for config in configs}
        self._in_yaml = {option.name: option for options in self.groups.values() for option in options}
        self._options = self._in_yaml | {_CONFIG.name: _CONFIG}
        self._comma_lists = {name for config in configs for name in getattr(config, "comma_lists", ())}
        self._positional = positional
        self._owners = owners
        required = [option.usage for option in self._options.values() if option.is_required]
        self._parser = ArgumentParser(
            prog=prog,
            usage=" ".join(["%(prog)s", *required, "[options]"]),
            description=description,
            epilog="\n  ".join(["examples:", *examples]) + f"\n\ndocumentation: {where_is(page)}",
            formatter_class=HelpFormatter,
            exit_on_error=False,
            add_help=False,
        )
        for config, options in (self.groups | {_FilesConfig: [_CONFIG]}).items():
            group = self._parser.add_argument_group(plain_text(config.__doc__ or "").partition(".")[0])
            for option in options:
                option.add_to(group)
        group.add_argument("-h", "--help", action="help", help="Show this help.")

    def print_help(self) -> None:
        """Print what the command does, and its options."""
        self._parser.print_help()

    def read(self, args: Sequence[str]) -> list[Any]:
        """The configs that the arguments ask for, in the order of their classes.

        Raises:
            ValueError: When an argument, or an option in a YAML file, can't be used; it names the command for help.
        """
        try:
            return self._read(args)
        except ValueError as error:
            raise ValueError(f"{error} (see {self._parser.prog} --help)") from error

    def _read(self, args: Sequence[str]) -> list[Any]:
        typed = self._from_args(args)
        values: dict[str, Any] = {}
        for file in typed.pop(_CONFIG.name, []):
            values = self._joined(values, self._from_yaml(file))
        values = self._joined(
            values, {name: self._options[name].check(value, self._parser) for name, value in typed.items()}
        )
        values = {name: value for name, value in values.items() if value is not None}  # null means the default
        for option in self._options.values():
            if option.is_required and option.name not in values:
                raise ValueError(f"{option.label} is missing; give {option.wanted}")
        # The last ones first: the first one looks for shards, which takes a while, and others' values are soon checked.
        made = [
            config(**{option.name: values[option.name] for option in options if option.name in values})
            for config, options in reversed(self.groups.items())
        ]
        return made[::-1]

    def _joined(self, values: dict[str, Any], winning: dict[str, Any]) -> dict[str, Any]:
        """All values, but none that a winning one takes the place of: each pair of these excludes the other."""
        pairs = [pair for config in self.groups for pair in getattr(config, "takes_place_of", ())]
        ousted = {other for name, other in pairs if winning.get(name) is not None}
        return {name: value for name, value in values.items() if name not in ousted} | winning

    def _from_yaml(self, file: str) -> dict[str, Any]:
        try:
            text = Path(file).expanduser().read_bytes()
            values = yaml.safe_load(text) or {}
            twice = _named_twice(yaml.compose(text, Loader=yaml.SafeLoader))
        except (OSError, ValueError, yaml.YAMLError) as error:
            why = getattr(error, "strerror", None) or error
            if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
                mark = error.problem_mark
                why = f"{error.problem}, in line {mark.line + 1}, column {mark.column + 1}"
            hint = _hint_on_quotes(Path(file).expanduser()) if isinstance(error, yaml.YAMLError) else ""
            raise ValueError(f"can't read --config {file}: {why}{hint}") from None
        if not isinstance(values, dict):
            raise ValueError(f"--config {file} holds no options; write them as `batch_size: 64`, one per line")
        if twice is not None:
            raise ValueError(f"{twice} is given twice in {file}; keep one of them")
        checked = {}
        for key, value in values.items():
            option = self._find(str(key), self._in_yaml, f" in {file}")
            if option.name in self._comma_lists:
                value = _as_text(value)
            if isinstance(value, dict):
                raise ValueError(f"{option.name} is {value} in {file}; a text that begins with {{ needs quotes")
            checked[option.name] = option.check(value, self._parser, f" in {file}")
        return checked

    def _from_args(self, args: Sequence[str]) -> dict[str, Any]:
        """What is typed, by the names of options: a text, or a list of them."""
        named: dict[str, list[str]] = {}
        unnamed: list[str] = []
        rest = deque(args)
        while rest:
            arg = rest.popleft()
            if arg == "--":
                unnamed += rest
                break
            if arg.startswith("-"):
                option, text = self._take_option(arg, rest)
                named.setdefault(option.name, []).append(text)
            else:
                unnamed.append(arg)
        if unnamed:
            self._name(unnamed, named)
        for name in self._comma_lists & named.keys():
            if len(texts := named[name]) > 1:
                raise ValueError(f"--{name} is given {len(texts)} times; give it once, as {','.join(texts)}")
        return {name: texts if self._options[name].is_list else texts[-1] for name, texts in named.items()}

    def _take_option(self, arg: str, rest: deque[str]) -> tuple[Option, str]:
        """An option and its text, which is taken from the rest if the argument has none."""
        label, has_text, text = arg.partition("=")
        negated = self._options.get(_key(label).removeprefix("no_"))
        if negated and negated.is_flag and _key(label) == f"no_{negated.name}" and not has_text:
            return negated, "false"
        option = self._find(LETTERS.get(label, label), self._options)
        if has_text:
            return option, text
        if option.is_flag:
            return option, rest.popleft() if rest and rest[0].lower() in ("true", "false") else "true"
        if not rest or rest[0].startswith("--"):
            raise ValueError(f"{option.label} has no value; it must be {option.expected}")
        return option, rest.popleft()

    def _find(self, label: str, options: dict[str, Option], where: str = "") -> Option:
        """The option that a YAML key or a ``--name`` means, with underscores or hyphens."""
        name = _key(label)
        if option := options.get(name):
            return option
        if others := self._owners(name):
            hint = f"; it belongs to {', '.join(others)}"
        else:
            hint = did_you_mean(name, options, "--{}" if label.startswith("-") else "{}")
        raise ValueError(f"unknown option {label}{where}{hint}")

    def _name(self, unnamed: list[str], named: dict[str, list[str]]) -> None:
        """Give the positional option its texts."""
        if self._positional is None:
            raise ValueError(f"{unnamed[0]!r} belongs to no option")
        option = self._options[self._positional]
        if option.name in named:
            raise ValueError(
                f"{option.label} is {unnamed[0]!r} and --{option.name} is {named[option.name][0]!r}; give one of them"
            )
        if len(unnamed) > 1 and not option.is_list:
            raise ValueError(f"{option.label} is {' and '.join(map(repr, unnamed))}; give one of them")
        named[option.name] = unnamed


def _named_twice(root: yaml.Node | None) -> str | None:
    """The first key of a YAML file that it has twice, of which PyYAML would take the last."""
    seen: set[str] = set()
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        name = _key(str(key.value))
        if name in seen:
            return name
        seen.add(name)
        if (below := _named_twice(value)) is not None:
            return below
    return None


def _as_text(value: Any) -> Any:
    """A list of texts, or names with their numbers, as they are typed: ``a,b`` and ``en=0.3,de=0.5``."""
    if isinstance(value, dict) and value and all(isinstance(one, int | float) for one in value.values()):
        # YAML takes true and null for more than their names.
        names = (json.dumps(name) if name is None or isinstance(name, bool) else name for name in value)
        return ",".join(f"{name}={number}" for name, number in zip(names, value.values(), strict=True))
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return ",".join(value)
    return value


def _hint_on_quotes(file: Path) -> str:
    """That texts which begin with a sign of YAML's own need quotes, if there is one without."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if found := _UNQUOTED.match(line):
            return f"; line {number}: texts that begin with @, * or {{ need quotes, as in {found[1]}'{found[2]}'"
    return ""


def _key(label: str) -> str:
    return label.removeprefix("--").replace("-", "_")
