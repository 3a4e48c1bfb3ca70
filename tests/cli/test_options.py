import re
from pathlib import Path

import pytest

from clipfilter_wds.cli.commands import COMMANDS
from clipfilter_wds.cli.config import LogConfig, ShowConfig
from clipfilter_wds.cli.options import options_of
from clipfilter_wds.cli.program import main
from clipfilter_wds.demo.config import DemoConfig
from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.engines.config import EngineConfig
from clipfilter_wds.report.config import ReportConfig, RunReportConfig
from clipfilter_wds.tables.config import TableConfig

CONFIGS = [
    DemoConfig,
    EngineConfig,
    LogConfig,
    ReportConfig,
    RewriteConfig,
    RunReportConfig,
    ScoreConfig,
    ScorerConfig,
    ShowConfig,
    TableConfig,
]


@pytest.fixture
def show(capsys, monkeypatch):
    """What a command's ``--help`` prints."""

    def run(command: str, columns: int = 100) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        COMMANDS[command].parser.print_help()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_an_option_with_help_free_of_markup(config):
    options = options_of(config)
    assert {option.name for option in options} == set(config.__dataclass_fields__)
    assert [
        option.name for option in options if not re.fullmatch(r"[^`]{12,}\.", option.help) or ":class:" in option.help
    ] == []


def test_required_options_come_first_and_own_ones_before_inherited_ones():
    names = [option.name for option in options_of(RewriteConfig)]
    assert names[:3] == ["shards", "output", "threshold"]
    assert names[-3:] == ["batch_size", "num_workers", "worker_timeout"]


def test_no_option_of_a_command_has_two_meanings():
    for command in COMMANDS.values():
        names = [option.name for options in command.parser.groups.values() for option in options]
        assert len(names) == len(set(names)), command.name


def test_help_shows_types_and_defaults_as_a_person_reads_them(show):
    text = show("rewrite")
    for line in (
        "usage: clipfilter-wds rewrite SHARDS ... --output PATH [options]",
        "  --batch_size N        Samples per forward pass; by default as many as suit",
        "  -o PATH, --output PATH",
        "  --flip, --no_flip     Score the mirrored image too",
        "  --engine {local,ray}  local processes the shards",
        "  --embeddings {fp16,fp32}\n",
        "  -q, --quiet, --no_quiet\n",
        "  clipfilter-wds rewrite 'data/{00000..00099}.tar' --output kept --threshold 0.28",
    ):
        assert f"\n{line}" in f"\n{text}"
    assert re.search(r"\(default:\s+openai/clip-vit-base-patch32\)", text)
    assert re.search(r"--worker_timeout NUMBER\s[^-]*\(default: 120\)", text)
    assert "(default: 0.25)" in show("table")
    assert re.search(r"--seed N\s[^-]*\(default: 0\)", show("rescore"))
    page = text.rpartition("\ndocumentation: ")[2].strip()
    assert Path(page) == Path(__file__).parents[2] / "docs" / "selection.md"
    assert not re.search(r"null|None|type:|Union|``|:class:|--\w+\+", text)


def test_help_is_in_groups(show):
    titles = re.findall(r"^(\w.*):$", show("rewrite"), re.MULTILINE)
    assert titles == [
        "Input, output and choice of rewrite",
        "The model, and how ClipScorer runs it",
        "Where shards are processed",
        "Report about the run",
        "Log of the run",
        "What is shown",
        "Other options",
        "examples",
    ]


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(show, command, columns):
    text, _ = show(command, columns).split("\nexamples:\n")
    _, _, groups = text.partition(COMMANDS[command].summary)
    assert max(map(len, groups.splitlines())) <= columns


OPTIONS = [
    pytest.param(command, option, id=f"{command}-{option.name}")
    for command in COMMANDS
    for options in COMMANDS[command].parser.groups.values()
    for option in options
]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_is_in_the_help_of_its_command(show, command, option):
    text = " ".join(show(command).split())
    assert f"--{option.name}" in text
    assert " ".join(option.help.split()) in text


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_without_a_value_or_with_a_wrong_one_gets_one_line_that_says_what_it_must_be(
    capsys, command, option
):
    typed = [] if option.is_flag else [f"--{option.name}"]
    takes_any = option.expected in ("text", "a path", "numbers, separated by commas")
    wrong = [] if takes_any else [f"--{option.name}=?!"]
    assert typed or wrong
    for arg in [*typed, *wrong]:
        with pytest.raises(SystemExit) as raised:
            main([command, arg])
        out, err = capsys.readouterr()
        assert (raised.value.code, out, err.count("\n")) == (2, "", 1)
        expected = re.escape(f"{option.expected} (see clipfilter-wds {command} --help)")
        line = rf"clipfilter-wds: (--)?{option.name} (has no value|is '\?!'); it must be {expected}\n"
        assert re.fullmatch(line, err, re.IGNORECASE), err
