import re

import pytest

from clipfilter_wds.cli.commands import COMMANDS
from clipfilter_wds.cli.options import options_of
from clipfilter_wds.demo.config import DemoConfig
from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.engines.config import EngineConfig
from clipfilter_wds.report.config import ReportConfig, RunReportConfig
from clipfilter_wds.tables.config import TableConfig

CONFIGS = [
    DemoConfig,
    EngineConfig,
    ReportConfig,
    RewriteConfig,
    RunReportConfig,
    ScoreConfig,
    ScorerConfig,
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
        "usage: clipfilter-wds rewrite SHARDS ... --output OUTPUT [options]",
        "  --batch_size N        Samples per forward pass; by default as many as suit",
        "  --flip, --no_flip     Score the mirrored image too",
        "  --engine {local,ray}  local processes the shards",
        "  clipfilter-wds rewrite 'data/{00000..00099}.tar' --output kept --threshold 0.28",
    ):
        assert f"\n{line}" in f"\n{text}"
    assert re.search(r"\(default:\s+openai/clip-vit-base-patch32\)", text)
    assert re.search(r"--worker_timeout NUMBER\s[^-]*\(default: 120\)", text)
    assert "(default: 0.25)" in show("table")
    assert not re.search(r"null|None|type:|Union|``|:class:|--\w+\+", text)


def test_help_is_in_groups(show):
    titles = re.findall(r"^(\w.*):$", show("rewrite"), re.MULTILINE)
    assert titles == [
        "Input, output and choice of rewrite",
        "The model, and how ClipScorer runs it",
        "Where shards are processed",
        "Report about the run",
        "Other options",
        "example",
    ]


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(show, command, columns):
    text, _ = show(command, columns).split("\nexample:\n")
    _, _, groups = text.partition(COMMANDS[command].summary)
    assert max(map(len, groups.splitlines())) <= columns
