"""Calls commands that do nothing, in a folder with shards, a table, and a config."""

import re
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest

from clipfilter_wds.cli import program
from clipfilter_wds.cli.commands import COMMANDS
from clipfilter_wds.cli.program import main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with shards, a table, and a config."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("0", "1", "2", "my-shard", "[ab]", "{c}"):
        Path("data", f"{name}.tar").touch()
    Path("in.csv").touch()
    Path("one.yaml").write_text("shards: data/0.tar\noutput: A\nthreshold: 0.28\n")
    return tmp_path


@pytest.fixture
def configs(folder, monkeypatch, capsys):
    """Call a command: the configs that it is given."""
    given = []

    def idle(command):
        return replace(command, run=wraps(command.run)(lambda *made: given.extend(made) or 0))

    monkeypatch.setattr(program, "COMMANDS", {name: idle(command) for name, command in COMMANDS.items()})

    def call(*args):
        given.clear()
        with pytest.raises(SystemExit) as raised:
            main([str(arg) for arg in args])
        assert raised.value.code == 0, capsys.readouterr().err
        return list(given)

    return call


@pytest.fixture
def fails(configs, capsys):
    """Call a command that is refused: what its one line on stderr says."""

    def call(*args):
        with pytest.raises(SystemExit) as raised:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (raised.value.code, out) == (2, "")
        assert not Path("o").exists()
        see = rf" \(see clipfilter-wds {args[0]} --help\)" if args and args[0] in COMMANDS else ""
        return re.fullmatch(rf"clipfilter-wds: ([^\n]*){see}\n", err)[1]

    return call
