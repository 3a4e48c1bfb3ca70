"""The command: which benchmarks, and how."""

import dataclasses
from collections.abc import Callable

from jsonargparse import ArgumentParser
from transformers.utils import logging as transformers_logging

from benchmarks.copy import copy
from benchmarks.gpu.run import gpu
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
    "gpu": gpu,
}

#: What ``all`` leaves out, since it takes another machine.
_ASKED_FOR = {"gpu"}


def main(args: list[str] | None = None) -> None:
    """Run the benchmarks that are named, or ``speed``."""
    parser = ArgumentParser(prog="python -m benchmarks", description="Ratios matter, not absolute times.")
    names = f"{', '.join(BENCHMARKS)}; all is all but gpu"
    parser.add_argument("names", nargs="*", default=["speed"], help=f"What to measure: {names}. By default speed.")
    parser.add_class_arguments(Options, nested_key=None, as_group=False)
    given = parser.instantiate_classes(parser.parse_args(args))
    if unknown := {*given.names} - {*BENCHMARKS, "all"}:
        parser.error(f"there is no benchmark {unknown.pop()!r}; use {names}")
    options = Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})
    transformers_logging.disable_progress_bar()
    report = Report(options.output, dataclasses.asdict(options))
    for name in BENCHMARKS:
        if name in given.names or ("all" in given.names and name not in _ASKED_FOR):
            BENCHMARKS[name](options, report)
