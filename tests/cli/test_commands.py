import signal
import subprocess
import sys
from dataclasses import replace
from functools import wraps

import pytest

from clipfilter_wds import __version__
from clipfilter_wds.cli import commands
from clipfilter_wds.cli.commands import COMMANDS
from clipfilter_wds.cli.program import main

HEAVY = {"torch", "torchvision", "transformers", "lightning", "ray", "pandas", "pyarrow", "webdataset"}


@pytest.fixture
def call(capsys):
    """Run the command in this process: its exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        captured = capsys.readouterr()
        return raised.value.code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (
            ValueError("no shard\nmatches \x1b[31m'https://user:secret@host/a'"),
            2,
            r"no shard matches \x1b[31m'https://host/a'",
        ),
        (OSError("no space"), 1, "no space. What was finished is whole; start the same command again to resume"),
        (KeyboardInterrupt(), 130, "stopped. What was finished is whole; start the same command again to resume"),
    ],
)
def test_how_a_run_that_fails_ends(call, monkeypatch, error, code, says):
    def fail(config, show):
        raise error

    monkeypatch.setitem(commands.COMMANDS, "demo", replace(COMMANDS["demo"], run=wraps(COMMANDS["demo"].run)(fail)))
    assert call("demo") == (code, "", f"clipfilter-wds: {says}\n")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("table", "in.csv --output out.csv", "Nothing was written; start the same command again"),
        ("report", "scores --output page.html", "Nothing was written; start the same command again"),
        ("export", "scores --format datacomp --output out", "Its output is not whole; delete that, and start the same"),
    ],
)
def test_who_stops_what_does_not_resume_is_not_told_so(call, monkeypatch, tmp_path, name, options, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(COMMANDS[name].parser, "read", lambda args: signal.raise_signal(signal.SIGINT))
    code, _, err = call(name, *options.split())
    assert (code, err.startswith(f"clipfilter-wds: stopped. {says}")) == (130, True)


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch):
    def fail(config, show):
        raise KeyError("a bug")

    monkeypatch.setitem(commands.COMMANDS, "demo", replace(COMMANDS["demo"], run=wraps(COMMANDS["demo"].run)(fail)))
    with pytest.raises(KeyError, match="a bug"):
        main(["demo"])


def test_overview_names_all_commands(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for command in COMMANDS.values():
        assert f"  {command.name} " in out
        assert f" {command.summary}\n" in out
    assert call("-h") == (code, out, err)


def test_version(call):
    assert call("--version") == (0, f"clipfilter-wds {__version__}\n", "")
    assert call("rewrite", "a", "--version") == (0, f"clipfilter-wds {__version__}\n", "")


def test_help_wherever_it_stands(call):
    code, out, _ = call("rewrite", "--help")
    assert code == 0
    assert call("rewrite", "a", "--output", "o", "-h") == (0, out, "")


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in COMMANDS),
        ["rewrite", "a", "--treshold", "1"],
        [],
    ],
    ids=" ".join,
)
def test_help_and_wrong_options_import_nothing_heavy(args):
    code = f"""
import sys
from clipfilter_wds.cli import main
try:
    main({args!r})
finally:
    print({HEAVY!r} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "set()"
