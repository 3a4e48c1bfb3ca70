"""What commands are given: each test calls a command that does nothing."""

import re
import shlex
from pathlib import Path

import pytest

from clipfilter_wds.cli.commands import COMMANDS
from clipfilter_wds.cli.config import LogConfig, ShowConfig
from clipfilter_wds.cli.program import main
from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.engines.config import EngineConfig
from clipfilter_wds.report.config import RunReportConfig
from tests.support.score_tables import shard_scores, written

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def test_each_config_gets_its_own_options(configs):
    options = "--output o --threshold 0.3 --precision fp32 --engine ray --cpus_per_task 2 --report r.html"
    assert configs("rewrite", "data/0.tar", *options.split()) == [
        RewriteConfig(shards=["data/0.tar"], output="o", threshold=0.3),
        ScorerConfig(precision="fp32"),
        EngineConfig(engine="ray", cpus_per_task=2),
        RunReportConfig(report="r.html"),
        LogConfig(),
        ShowConfig(),
    ]
    others = [ScorerConfig(), EngineConfig(), LogConfig(), ShowConfig()]
    assert configs("score", "data/0.tar", "--output", "o")[1:] == others
    assert configs("demo")[0].output == "clipfilter_demo"


@pytest.mark.parametrize(
    ("command", "example"), [(command, example) for command in COMMANDS for example in COMMANDS[command].examples]
)
def test_the_examples_in_the_help_can_be_typed(command, example, configs, tmp_path):
    for number in range(100):
        Path(f"data/{number:05d}.tar").touch()
    Path("photos.csv").touch()
    if "--scores" in example:
        Path("scores").mkdir()
        Path("scores/00000.parquet").write_bytes(written(shard_scores([])))
    assert configs(command, *shlex.split(example))


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_the_help_names_a_page_that_is_there(command):
    assert (ROOT / command.page).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_on_a_page_can_be_typed(page, configs, capsys):
    for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        for command in re.findall(r"^(?:\S+ )*(?:clipfilter-wds|-m clipfilter_wds) ([^\n]*)", block, re.MULTILINE):
            if "://" in command or "[" in command:
                continue  # would look for a bucket, or installs an extra
            with pytest.raises(SystemExit) as raised:
                main(shlex.split(command, comments=True))
            # The shards, tables and lists of the page are not there.
            missing = r"no shard matches|input .* is no file|there is no (score table|folder)|can't read subset"
            assert raised.value.code == 0 or re.match(f"clipfilter-wds: ({missing}) ", capsys.readouterr().err), command


class TestPositional:
    @pytest.mark.parametrize(
        ("args", "names"),
        [
            ("data/0.tar --output o", ["data/0.tar"]),
            ("--output o data/0.tar", ["data/0.tar"]),
            ("data/0.tar data/1.tar --output o", ["data/0.tar", "data/1.tar"]),
            ("data/0.tar --output o data/1.tar --flip data/2.tar", ["data/0.tar", "data/1.tar", "data/2.tar"]),
            ("--output o -- data/0.tar -d.tar", ["data/0.tar", "-d.tar"]),
            ("--shards data/0.tar --output o", ["data/0.tar"]),
            ("--shards=data/0.tar --shards data/1.tar --output o", ["data/0.tar", "data/1.tar"]),
            ("data/{0..2}.tar --output o", ["data/{0..2}.tar"]),
            ("data/[ab].tar --output o", ["data/[ab].tar"]),
            ("data/{c}.tar --output o", ["data/{c}.tar"]),
            ("123 --output o", ["123"]),
            ("@list.txt --output o", ["@list.txt"]),
        ],
    )
    def test_shards(self, configs, args, names):
        for name in ("123", "-d.tar"):
            Path(name).touch()
        Path("list.txt").write_text("data/0.tar\ndata/1.tar\n")
        run = configs("rewrite", *args.split())[0]
        assert (run.shards, run.output) == (names, "o")

    def test_exactly_one_of_positional_and_option(self, fails):
        assert fails("rewrite", "--output", "o") == "SHARDS is missing; give SHARDS ..."
        both = fails("rewrite", "data/0.tar", "--shards", "data/1.tar")
        assert both == "SHARDS is 'data/0.tar' and --shards is 'data/1.tar'; give one of them"

    def test_report_and_table(self, configs, fails):
        assert configs("report", "s", "--output", "r.html", "--shards", "a")[0].scores == "s"
        assert configs("report", "--scores", "s", "--output", "r.html")[0].scores == "s"
        assert configs("table", "--output", "o.csv", "in.csv")[0].input == "in.csv"
        assert fails("report", "s", "t", "--output", "r.html") == "SCORES is 's' and 't'; give one of them"
        assert fails("report", "--output", "r.html") == "SCORES is missing; give SCORES"

    def test_choices_of_an_option_that_is_missing_are_named(self, fails):
        says = "--format is missing; give --format clip_retrieval|datacomp"
        assert fails("export", "s", "--output", "o") == says
        assert "give --method METHOD, one of neg_clip_loss, " in fails("rescore", "s", "--output", "o")

    def test_a_command_without_one(self, fails):
        assert fails("demo", "x") == "'x' belongs to no option"


class TestFlags:
    @pytest.mark.parametrize(
        ("args", "flip"),
        [
            ("--flip", True),
            ("--flip true", True),
            ("--flip False", False),
            ("--flip=true", True),
            ("--flip=false", False),
            ("--no_flip", False),
            ("--no-flip", False),
            ("--flip --no_flip", False),
            ("", False),
        ],
    )
    def test_need_no_value(self, configs, args, flip):
        shards = ["data/0.tar", "data/1.tar"]
        for typed in ([*shards, *args.split()], [*args.split(), *shards]):
            run, model, *_ = configs("rewrite", "--output", "o", *typed)
            assert (run.shards, model.flip) == (shards, flip)

    def test_other_values(self, fails):
        shards = ("data/0.tar", "--output", "o")
        assert fails("rewrite", *shards, "--flip=maybe") == "flip is 'maybe'; it must be true or false"
        assert "unknown option --no_output" in fails("rewrite", *shards, "--no_output")


def test_letters_of_options(configs):
    run, *_, show = configs("score", "data/0.tar", "-q", "-o", "out")
    assert (run.shards, run.output, show.quiet) == (["data/0.tar"], "out", True)
    assert configs("demo", "-o=here")[0].output == "here"


def test_hyphens_in_the_names_of_options_are_underscores(configs):
    args = "data/my-shard.tar --output my-output --caption=json:alt-text --num-workers=4 --samples-per-shard 7"
    run, model, *_ = configs("rewrite", *args.split(), "--fast-decode")
    assert (run.num_workers, run.samples_per_shard, model.fast_decode) == (4, 7, True)
    assert (run.shards, run.output, run.caption) == (["data/my-shard.tar"], "my-output", "json:alt-text")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--threshold", "abc"], "threshold is 'abc'; it must be a number"),
        (["--threshold", ""], "threshold is ''; it must be a number"),
        (["--batch_size", "1.5"], "batch_size is '1.5'; it must be a whole number"),
        (["--num-workers", "many"], "num_workers is 'many'; it must be a whole number"),
        (["--precision", "fp8"], "precision is 'fp8'; it must be one of auto, fp32, bf16, fp16"),
        (["--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["--num_workers", "-1"], "num_workers is -1; it must be at least 0"),
        (["--cpus_per_task", "3"], "ray_address and cpus_per_task are for --engine ray"),
        (["--treshold", "0.2"], "unknown option --treshold; did you mean --threshold?"),
        (["--num-worker=2"], "unknown option --num-worker; did you mean --num_workers?"),
        (["--zzz"], "unknown option --zzz"),
        (["-x", "x"], "unknown option -x"),
        (["-threshold", "0.2"], "unknown option -threshold; did you mean --threshold?"),
        (["-o"], "--output has no value; it must be a path"),
        (["--threshold"], "--threshold has no value; it must be a number"),
        (["--subset", ""], "subset is empty; it must be a path. Is a variable not set?"),
        (["--scores", " "], "scores is empty; it must be a path. Is a variable not set?"),
        (["--subset", "--flip"], "--subset has no value; it must be a path"),
    ],
)
def test_an_error_names_option_found_and_expected(fails, args, says):
    assert fails("rewrite", "data/0.tar", "--output", "o", *args) == says


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("score data/0.tar --threshold 0.3", "unknown option --threshold; it belongs to rewrite, report, table"),
        ("score data/0.tar --keep-fraction=0.3", "unknown option --keep-fraction; it belongs to rewrite, table"),
        ("table in.csv --caption json:caption", "unknown option --caption; it belongs to rewrite, score"),
        ("score --config one.yaml", "unknown option threshold in one.yaml; it belongs to rewrite, report, table"),
    ],
)
def test_an_option_of_other_commands_is_known_as_theirs(fails, args, says):
    assert fails(*args.split()) == says


def test_a_list_with_commas_is_given_once_so_that_none_of_it_is_lost(fails):
    for option, one, other in (("columns", "json:a", "json:b=text"), ("caption", "txt", "json:caption")):
        says = f"--{option} is given 2 times; give it once, as {one},{other}"
        assert fails("score", "data/0.tar", "--output", "o", f"--{option}", one, f"--{option}={other}") == says


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_output_is_not_the_current_folder(fails, command):
    source = ["x"] if COMMANDS[command].positional else []
    assert fails(command, *source, "-o", "") == "output is empty; it must be a path. Is a variable not set?"


def test_a_missing_or_unknown_command(fails):
    known = r"use one of demo, rewrite, score, rescore, dedup, report, export, table (see clipfilter-wds --help)"
    assert fails() == f"no command is given; {known}"
    assert fails("xyz") == f"'xyz' is no command; {known}"
    assert fails("rewrit") == "'rewrit' is no command; did you mean clipfilter-wds rewrite? (see clipfilter-wds --help)"


def test_no_secret_and_no_control_character_of_an_argument_is_printed(fails):
    line = fails("rewrite", "https://user:secret@host/a?key=hidden", "--output", "o", "--threshold", "\x1b[31m")
    assert line == r"threshold is '\x1b[31m'; it must be a number"
    line = fails("report", "https://user:secret@host/a?key=hidden", "t", "--output", "r.html")
    assert line == "SCORES is 'https://host/a' and 't'; give one of them"
