"""The command: which benchmarks, and how."""

import dataclasses
from collections.abc import Callable

from jsonargparse import ArgumentParser
from transformers.utils import logging as transformers_logging

from benchmarks.copy import copy
from benchmarks.host import host
from benchmarks.inline import inline
from benchmarks.length import length
from benchmarks.options import Options
from benchmarks.report import Report
from benchmarks.speed import speed
from benchmarks.workers import workers

#: By name, in the order in which they run.
BENCHMARKS: dict[str, Callable[[Options, Report], None]] = {
    "speed": speed,
    "workers": workers,
    "inline": inline,
    "length": length,
    "copy": copy,
    "host": host,
}


def main(args: list[str] | None = None) -> None:
    """Run the benchmarks that are named, or ``speed``."""
    parser = ArgumentParser(prog="python -m benchmarks", description="Ratios matter, not absolute times.")
    names = ", ".join([*BENCHMARKS, "all"])
    parser.add_argument("names", nargs="*", default=["speed"], help=f"What to measure, of {names}; speed by default.")
    parser.add_class_arguments(Options, nested_key=None, as_group=False)
    given = parser.instantiate_classes(parser.parse_args(args))
    if unknown := {*given.names} - {*BENCHMARKS, "all"}:
        parser.error(f"there is no benchmark {unknown.pop()!r}; use {names}")
    options = Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})
    transformers_logging.disable_progress_bar()
    report = Report(options.output, dataclasses.asdict(options))
    for name in BENCHMARKS:
        if {name, "all"} & {*given.names}:
            BENCHMARKS[name](options, report)
