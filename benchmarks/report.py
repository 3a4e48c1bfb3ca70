"""What was measured, as tables on the terminal, as JSON and as plots."""

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import Spread

#: Of the tables, in a pipe or a narrow terminal too.
_WIDTH = 160


class Report:
    """Collects the results of a run.

    Args:
        folder: Where ``results.json`` and the plots go.
        options: How it was measured.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._console = folder, Console()
        self._console.width = max(self._console.width, _WIDTH)
        self._results: dict[str, Any] = {"options": options, "machine": machine()}

    def tell(self, line: str) -> None:
        """Say how far it is."""
        self._console.print(f"  {line}", style="dim", highlight=False)

    def table(self, title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
        """Print rows and keep them for the JSON.

        Args:
            title: Above the table.
            columns: Heading -> the entry of a row that stands under it.
            rows: Entries may be missing.
        """
        table = Table(title=title, title_justify="left")
        for number, heading in enumerate(columns):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            cells = [row.get(entry) for entry in columns.values()]
            table.add_row(*("" if cell is None else str(cell) for cell in cells))
        self._console.print(table)

    def add(self, name: str, **values: Any) -> None:
        """Keep values for the JSON."""
        self.keep(name, values)

    def keep(self, name: str, result: Any) -> None:
        """Keep a result for the JSON, which is written anew each time: a run that is stopped leaves its part."""
        self._results[name] = result
        text = json.dumps(self._results, indent=1, default=_plain)
        (self._folder / "results.json").write_text(text + "\n")

    def plot(self, name: str, draw: Callable[[Any], None]) -> None:
        """Draw a figure; without matplotlib, say what is missing."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            self.tell("no plot: pip install 'clipfilter-wds[benchmarks]'")
            return
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        draw(figure.subplots())
        figure.savefig(self._folder / f"{name}.png", dpi=120)


def bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rates of contenders, side by side on a logarithmic scale, with their spread."""
    rates = [row["rate"] for row in rows]
    medians = [rate.median for rate in rates]
    errors = [[rate.median - rate.low for rate in rates], [rate.high - rate.median for rate in rates]]
    axes.barh([row["name"] for row in rows], medians, xerr=errors, capsize=3)
    axes.bar_label(axes.containers[-1], [f" {rate:,.1f}" for rate in medians], padding=4)
    axes.set_xscale("log")
    axes.set_xlabel("samples per second")
    axes.invert_yaxis()
    axes.margins(x=0.15)


def growth(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Seconds and peak memory over the number of samples."""
    samples = [row["samples"] for row in rows]
    axes.loglog(samples, [row["seconds"] for row in rows], "o-", label="seconds")
    axes.loglog(samples, [row["peak"] for row in rows], "s--", label="peak MiB of all processes")
    axes.set_xlabel("samples")
    axes.legend()


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Spread) else str(value)
