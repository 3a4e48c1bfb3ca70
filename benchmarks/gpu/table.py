"""Writes the figures as tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

_MET = {True: "yes", False: "**no**", None: "not measured"}


def as_markdown(content: Mapping[str, Any]) -> str:
    """What ``gpu.json`` holds, to be read."""
    conditions, parts = content["conditions"], content["parts"]
    targets = [{**row, "met": _MET[row["met"]]} for row in content["targets"]]
    seconds = [{"part": name, "seconds": figures.get("seconds")} for name, figures in parts.items()]
    lines = ["# What a GPU does", "", ", ".join(f"{name}: {value}" for name, value in conditions.items()), ""]
    lines += [*_table(targets), "", "## Parts", ""]
    for name, figures in parts.items():
        lines += [f"### {name}", "", *_of_part(figures), ""]
    lines += ["## Seconds", "", *_table([*seconds]), ""]
    lines += [f"Call {number}: {call}" for number, call in enumerate(content["phases"], 1)]
    return "\n".join(lines) + "\n"


def _of_part(figures: Mapping[str, Any]) -> list[str]:
    rows = figures.get("rows", [])
    single = [
        {"figure": name, "value": value}
        for name, value in figures.items()
        if name not in ("rows", "traceback", "seconds", "flops")
    ]
    return [*_table(single), *(["", *_table(rows)] if rows else [])]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return lines + [f"| {' | '.join(_cell(row.get(name)) for name in names)} |" for row in rows]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
