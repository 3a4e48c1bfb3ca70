"""What commands are given: each test calls a command that does nothing."""

import re
import shlex
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import yaml

from clipfilter_wds.cli import program
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


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A working folder with shards, a table, and a config."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("0", "1", "2", "my-shard", "[ab]", "{c}"):
        Path("data", f"{name}.tar").touch()
    Path("in.csv").touch()
    Path("one.yaml").write_text("shards: data/0.tar\noutput: A\nthreshold: 0.28\n")


@pytest.fixture
def configs(monkeypatch, capsys):
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


class TestCommandLineWins:
    @pytest.mark.parametrize(
        "args",
        [
            "data/1.tar --config one.yaml --output B --threshold 0.5",
            "--config one.yaml --output B --threshold 0.5 data/1.tar",
            "--output B --threshold 0.5 data/1.tar --config=one.yaml",
            "--threshold=0.5 --config one.yaml --output=B --shards data/1.tar",
        ],
    )
    def test_wherever_the_file_stands(self, configs, args):
        run = configs("rewrite", *args.split())[0]
        assert (run.shards, run.output, run.threshold) == (["data/1.tar"], "B", 0.5)
        assert not Path("A").exists()

    def test_later_files_win_over_earlier_ones(self, configs):
        Path("two.yaml").write_text("threshold: 0.1\nbatch_size: 3\nflip: true\n")
        run, model, *_ = configs("rewrite", "--config", "one.yaml", "--config", "two.yaml")
        assert (run.shards, run.threshold, run.batch_size, model.flip) == ("data/0.tar", 0.1, 3, True)
        assert configs("rewrite", "--config", "two.yaml", "--config", "one.yaml")[0].threshold == 0.28
        args = "--config one.yaml --no_flip --config two.yaml --batch_size 9"
        run, model, *_ = configs("rewrite", *args.split())
        assert (run.threshold, run.batch_size, model.flip) == (0.1, 9, False)

    def test_null_takes_back_what_an_earlier_file_says(self, configs):
        Path("two.yaml").write_text("threshold: null\nkeep_fraction: 0.3\nbatch_size: null\n")
        run = configs("rewrite", "--config", "one.yaml", "--config", "two.yaml")[0]
        assert (run.threshold, run.keep_fraction, run.batch_size) == (None, 0.3, None)

    @pytest.mark.parametrize(
        ("written", "typed", "given"),
        [
            ("threshold: 0.28", "--keep_fraction 0.5", (None, 0.5)),
            ("keep_fraction: 0.5", "--threshold 0.28", (0.28, None)),
            ("threshold: 0.28", "--config two.yaml", (None, 0.3)),
        ],
    )
    @pytest.mark.parametrize("command", ["rewrite data/0.tar --output o", "table in.csv --output o.csv"])
    def test_an_option_takes_the_place_of_one_that_it_excludes(self, configs, command, written, typed, given):
        Path("x.yaml").write_text(written)
        Path("two.yaml").write_text("keep_fraction: 0.3")
        run = configs(*command.split(), "--config", "x.yaml", *typed.split())[0]
        assert (run.threshold, run.keep_fraction) == given

    def test_scores_that_are_typed_take_the_place_of_what_says_how_to_score(self, configs):
        Path("x.yaml").write_text("shards: data/0.tar\nembeddings: fp16\ncolumns: json:a\nlimit: 3\n")
        run = configs("rewrite", "--config", "x.yaml", "--output", "o", "--scores", "s")[0]
        assert (run.scores, run.embeddings, run.columns, run.limit) == ("s", None, None, None)

    def test_what_excludes_each_other_in_one_place_is_refused(self, fails):
        Path("x.yaml").write_text("threshold: 0.28\nkeep_fraction: 0.5\n")
        both = "threshold 0.28 and keep_fraction 0.5 both say which scores to keep; give one"
        assert fails("rewrite", "data/0.tar", "--output", "o", "--config", "x.yaml") == both
        assert fails("rewrite", "data/0.tar", "-o", "o", "--threshold", "0.28", "--keep_fraction", "0.5") == both

    @pytest.mark.parametrize("config", sorted(ROOT.glob("configs/[rs]*.yaml")), ids=lambda path: path.stem)
    def test_over_the_files_that_come_with_the_package(self, config, configs):
        command = config.read_text().split()[2]
        run = configs(command, "--config", config, "data/1.tar", "--output", "elsewhere")[0]
        assert (run.shards, run.output) == (["data/1.tar"], "elsewhere")
        assert {"shards", "output"} <= set(yaml.safe_load(config.read_text()))


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("treshold: 0.3", "unknown option treshold in x.yaml; did you mean threshold?"),
            ("zzz: 1", "unknown option zzz in x.yaml"),
            ("config: one.yaml", "unknown option config in x.yaml"),
            ("threshold: abc", "threshold is 'abc' in x.yaml; it must be a number"),
            ("threshold: true", "threshold is True in x.yaml; it must be a number"),
            ("batch_size: 1.5", "batch_size is 1.5 in x.yaml; it must be a whole number"),
            ("flip: maybe", "flip is 'maybe' in x.yaml; it must be true or false"),
            ("revision: 123", "revision is 123 in x.yaml; it must be text"),
            ("shards: [3]", "shards is 3 in x.yaml; it must be a path"),
            ("precision: fp8", "precision is 'fp8' in x.yaml; it must be one of auto, fp32, bf16, fp16"),
            ("batch_size: 0", "batch_size is 0; it must be at least 1"),
            ("threshold: 0.3\nflip: true\nthreshold: 0.5", "threshold is given twice in x.yaml; keep one of them"),
            ("num-workers: 1\nnum_workers: 2", "num_workers is given twice in x.yaml; keep one of them"),
            ("subset: ''", "subset is empty in x.yaml; it must be a path. Is a variable not set?"),
            ("- a", "--config x.yaml holds no options; write them as `batch_size: 64`, one per line"),
        ],
    )
    def test_what_is_wrong(self, fails, text, says):
        Path("x.yaml").write_text(text + "\n")
        assert fails("rewrite", "data/0.tar", "--output", "o", "--config", "x.yaml") == says

    def test_a_file_that_cannot_be_read(self, fails):
        assert fails("rewrite", "--config", "no.yaml") == "can't read --config no.yaml: No such file or directory"
        Path("binary.yaml").write_bytes(b"\xff\xfe\xfa")
        assert "can't read --config binary.yaml: " in fails("rewrite", "--config", "binary.yaml")
        Path("broken.yaml").write_text("a: [\n")
        assert re.match(r"can't read --config broken.yaml: .* line 2", fails("rewrite", "--config", "broken.yaml"))

    @pytest.mark.parametrize(
        ("line", "cure"),
        [
            ("shards: @list.txt", "shards: '@list.txt'"),
            ("shards: *.tar", "shards: '*.tar'"),
            ("shards: {0..3}/*.tar ", "shards: '{0..3}/*.tar'"),
            ("shards:\n  - data/0.tar\n  - @more.txt", "- '@more.txt'"),
            ("shards: {a,b}.tar", "shards: '{a,b}.tar'"),
        ],
    )
    def test_texts_that_need_quotes(self, fails, configs, line, cure):
        Path("x.yaml").write_text(f"output: o\n{line}\nflip: true\n")
        message = fails("rewrite", "--config", "x.yaml")
        assert "can't read --config x.yaml" in message
        assert message.endswith(f"texts that begin with @, * or {{ need quotes, as in {cure}")

    def test_a_text_that_yaml_takes_for_an_object(self, fails):
        Path("x.yaml").write_text("shards: {a}\n")
        message = fails("rewrite", "--output", "o", "--config", "x.yaml")
        assert message == "shards is {'a': None} in x.yaml; a text that begins with { needs quotes"

    def test_other_mistakes_get_no_advice_on_quotes(self, fails):
        Path("x.yaml").write_text("output: '{a}'\nshards: '*.tar'\na: b: c\n")
        assert "quotes" not in fails("rewrite", "--config", "x.yaml")

    def test_an_empty_file(self, configs):
        Path("empty.yaml").write_text("# nothing yet\n")
        assert configs("rewrite", "data/0.tar", "--output", "o", "--config", "empty.yaml")[0].shards == ["data/0.tar"]

    def test_lists_flags_and_hyphens(self, configs):
        Path("x.yaml").write_text(
            "shards: [data/0.tar, data/1.tar]\noutput: o\nnum-workers: 3\nflip: true\ncompile: no\n"
        )
        run, model, *_ = configs("rewrite", "--config", "x.yaml")
        assert (run.shards, run.num_workers) == (["data/0.tar", "data/1.tar"], 3)
        assert (model.flip, model.compile) == (True, False)

    def test_lists_of_what_is_typed_with_commas(self, configs):
        Path("x.yaml").write_text(
            "columns: ['json:a', 'json:ok=bool']\ncaption: [txt, 'json:alt']\ngroup_by: ok\nkeep_fraction: 0.5\n"
            "group_limits: {true: 0.3, en: 1}\n"
        )
        run = configs("rewrite", "data/0.tar", "--output", "o", "--config", "x.yaml")[0]
        assert (run.columns, run.caption, run.group_limits) == ("json:a,json:ok=bool", "txt,json:alt", "True=0.3,en=1")


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
