import json
import os
import pty
import re
import shlex
import subprocess
import sys

import pytest

from clipfilter_wds.cli import main
from tests.support.toys import make_clip, pair, tar_members, write_shard

COMMAND = [sys.executable, "-m", "clipfilter_wds"]


@pytest.fixture
def shards(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / "in" / f"{shard:05d}.tar", [pair(10 * shard + i) for i in range(10)])
    return tmp_path / "in"


@pytest.fixture
def call(capsys):
    """Run the command in this process: its exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as raised:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return raised.value.code, captured.out, captured.err

    return run


def test_rewrite_writes_shards_and_a_summary_table(call, shards, clip_folder, tmp_path):
    options = ("--output", tmp_path / "out", "--model", clip_folder, "--threshold", "0.1", "--device", "cpu")
    code, out, _ = call("rewrite", f"{shards}/*.tar", *options)
    assert code == 0
    summary = json.loads((tmp_path / "out/summary.json").read_bytes())
    assert re.search(rf"seen +{summary['seen']}\b", out)
    assert re.search(rf"kept +{summary['kept']}\b", out)
    assert re.search(rf"below_threshold +{summary['dropped']['below_threshold']}\b", out)


def test_score_writes_tables_only(call, shards, clip_folder, tmp_path):
    code, out, _ = call("score", f"{shards}/*.tar", "--output", tmp_path / "out", "--model", clip_folder)
    assert code == 0
    assert "scored" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.parquet",
        "00001.parquet",
        "summary.json",
    ]


def test_the_last_lines_say_where_the_output_is_and_what_can_be_run_next(call, shards, clip_folder, tmp_path):
    model = ("--model", clip_folder, "--num_workers", "0")
    scores, kept = tmp_path / "scores", tmp_path / "kept"
    _, out, _ = call("score", shards, "-o", scores, *model)
    *_, where, spread, thresholds, then = out.splitlines()
    assert where == f"the score tables are in {scores}"
    assert spread.startswith("scores: 10% below ")
    assert thresholds.startswith("thresholds: ")
    command = re.match(r"next: clipfilter-wds (.* --output) DIR, or --threshold", then)[1]
    code, out, _ = call(*shlex.split(command), kept)
    assert code == 0
    assert f"the kept samples are in {kept}" in out
    command = re.search(r"next: clipfilter-wds (.* --output) report.html shows", out)[1]
    assert call(*shlex.split(command), tmp_path / "r.html")[:2] == (0, f"the report is {tmp_path / 'r.html'}\n")
    assert "nothing was left to do" not in out
    _, out, _ = call("score", shards, "-o", scores, *model)
    assert "all of it was done by an earlier run; nothing was left to do" in out
    assert call("score", shards, "-o", scores, *model, "-q") == (0, "", "")


def test_what_can_be_run_next_can_be_pasted_for_any_names_of_shards(call, clip_folder, tmp_path):
    given = [tmp_path / name for name in ("a b,c.tar", "it's.tar", "0.tar")]
    for number, path in enumerate(given):
        write_shard(path, [pair(10 * number + index) for index in range(4)])
    model = ("--model", clip_folder, "--num_workers", "0")
    _, out, _ = call("score", *given, "-o", tmp_path / "scores", *model)
    command = re.search(r"next: clipfilter-wds (.* --output) DIR, or --threshold", out)[1]
    code, out, _ = call(*shlex.split(command), tmp_path / "kept")
    assert code == 0
    command = re.search(r"next: clipfilter-wds (.* --output) report.html shows", out)[1]
    assert call(*shlex.split(command), tmp_path / "r.html")[0] == 0
    assert "is not among those given" not in (tmp_path / "r.html").read_text()


def test_quiet_tells_failures_alone(call, shards, clip_folder, tmp_path):
    (shards / "garbage.tar").write_bytes(b"garbage" * 1000)
    options = ("-o", tmp_path / "out", "--model", clip_folder, "--num_workers", "0", "--quiet")
    code, out, err = call("rewrite", shards, *options)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"failed .*garbage\.tar: it is not a tar archive[^\n]*\n", err)


def test_every_option_can_come_from_a_yaml_file(call, shards, clip_folder, tmp_path):
    config = {
        "shards": f"{shards}/00000.tar",
        "output": str(tmp_path / "out"),
        "model": str(clip_folder),
        "threshold": -1,
        "batch_size": 3,
        "num_workers": 0,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert call("rewrite", "--config", tmp_path / "run.yaml")[0] == 0
    assert tar_members(tmp_path / "out/00000.tar") == tar_members(shards / "00000.tar")


class TestCommandLineWins:
    """What is typed wins over ``--config``, wherever that stands."""

    @pytest.fixture
    def rewrite(self, call, shards, clip_folder, tmp_path, monkeypatch):
        """Run ``rewrite`` beside a ``one.yaml``: per output folder, the shards that were done and the threshold."""
        monkeypatch.chdir(tmp_path)
        config = {"shards": f"{shards}/00000.tar", "output": "A", "threshold": 0.28, "model": str(clip_folder)}
        (tmp_path / "one.yaml").write_text(json.dumps({**config, "num_workers": 0}))

        def run(*arguments) -> dict[str, tuple[list[str], float]]:
            assert call("rewrite", *arguments)[0] == 0
            return {
                summary.parent.name: (
                    sorted(mark.name.removesuffix("_stats.json") for mark in summary.parent.glob("*_stats.json")),
                    json.loads(summary.read_bytes())["threshold"],
                )
                for summary in tmp_path.glob("*/summary.json")
            }

        return run

    def test_positional_before_the_file(self, rewrite, shards):
        assert rewrite(shards / "00001.tar", "--config", "one.yaml", "--output", "B") == {"B": (["00001"], 0.28)}

    def test_output_before_the_file(self, rewrite):
        assert rewrite("--output", "D", "--config", "one.yaml") == {"D": (["00000"], 0.28)}

    def test_threshold_before_the_file(self, rewrite):
        assert rewrite("--threshold", "0.5", "--config", "one.yaml") == {"A": (["00000"], 0.5)}

    def test_after_the_file(self, rewrite, shards):
        options = ("--output", "B", "--threshold", "0.5", "--shards", f"{shards}/00001.tar")
        assert rewrite("--config", "one.yaml", *options) == {"B": (["00001"], 0.5)}


def test_shards_that_the_shell_has_spread_and_flags_without_value(call, shards, clip_folder, tmp_path):
    spread = sorted(shards.glob("*.tar"))
    options = ("--model", clip_folder, "--num-workers", "0", "--threshold", "0")
    assert call("rewrite", *spread, "--flip", "--output", tmp_path / "a", *options)[0] == 0
    assert call("rewrite", f"{shards}/*.tar", "--output", tmp_path / "b", *options, "--flip", "true")[0] == 0
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / out).glob("*.tar")} for out in "ab")
    assert a == b != {}
    assert call("rewrite", *spread, "--no_flip", "--output", tmp_path / "a", *options)[0] == 2  # another fingerprint


def test_failed_shards_give_exit_code_1_and_their_names(call, shards, clip_folder, tmp_path):
    (shards / "garbage.tar").write_bytes(b"garbage" * 1000)
    code, out, _ = call("rewrite", f"{shards}/*.tar", "--output", tmp_path / "out", "--model", clip_folder)
    assert code == 1
    assert re.search(r"failed .*garbage\.tar: it is not a tar archive", out)
    assert (tmp_path / "out/00000_stats.json").exists()


class TestUnusableArguments:
    """Exit code 2, one line on stderr that says what to do, nothing on stdout and nothing written."""

    def check(self, call, *arguments, says: str) -> None:
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"clipfilter-wds[^\n]*{says}[^\n]*\n", err), err

    def test_no_shard_matches(self, call, tmp_path):
        self.check(call, "rewrite", f"{tmp_path}/*.tar", "--output", tmp_path / "o", says="no shard matches")
        assert not (tmp_path / "o").exists()

    def test_output_is_the_input_folder(self, call, shards):
        before = sorted(shards.iterdir())
        self.check(call, "rewrite", f"{shards}/*.tar", "--output", shards, says="holds input; choose another")
        assert sorted(shards.iterdir()) == before

    def test_output_cannot_be_written(self, call, shards, tmp_path):
        (tmp_path / "file").write_text("in the way")
        self.check(call, "rewrite", f"{shards}/*.tar", "--output", tmp_path / "file", says="can't write to output")
        self.check(call, "rewrite", f"{shards}/*.tar", "--output", "/proc/nowhere", says="can't write to output")

    def test_threshold_no_cosine_can_reach(self, call, shards, tmp_path):
        options = ("--output", tmp_path / "o", "--threshold", "1.4")
        self.check(
            call, "rewrite", f"{shards}/*.tar", *options, says=r"a cosine lies in \[-1, 1\]. Did you mean 0.14\?"
        )

    def test_options_that_exclude_each_other_or_choose_nothing(self, call, shards, tmp_path):
        def check(*options, says: str) -> None:
            self.check(call, "rewrite", f"{shards}/*.tar", "--output", tmp_path / "o", *options, says=says)

        check("--threshold", "0.2", "--keep_fraction", "0.5", says="threshold 0.2 and keep_fraction 0.5 .* give one")
        check("--keep_fraction", "30", says=r"lies in \[0, 1\]. Did you mean 0.3\?")
        check("--samples_per_shard", "0", says="samples_per_shard is 0; it must be at least 1")
        check("--subset", tmp_path / "none.npy", says="can't read subset .*none.npy")
        check("--scores", tmp_path, says="there is no score table in")

    def test_unknown_option(self, call, shards, tmp_path):
        options = ("--output", tmp_path / "o", "--treshold", "0.2")
        self.check(call, "rewrite", f"{shards}/*.tar", *options, says="--treshold")

    def test_value_of_another_type(self, call, shards, tmp_path):
        options = ("--output", tmp_path / "o", "--threshold", "high")
        self.check(call, "rewrite", f"{shards}/*.tar", *options, says="threshold.*number")

    def test_no_output(self, call, shards):
        self.check(call, "rewrite", f"{shards}/*.tar", says="output")

    def test_no_command(self, call):
        self.check(call, says="demo, rewrite, score")

    def test_pipe_url_is_refused_and_not_run(self, call, tmp_path):
        marker = tmp_path / "ran"
        self.check(call, "rewrite", f"pipe:touch {marker}", "--output", tmp_path / "o", says="shell command")
        self.check(call, "rewrite", f"{{pipe:touch {marker},x}}", "--output", tmp_path / "o", says="no shard matches")
        assert not marker.exists()

    def test_unusable_model(self, call, shards, tmp_path):
        options = ("--output", tmp_path / "o", "--model", tmp_path / "none")
        self.check(call, "rewrite", f"{shards}/*.tar", *options, says="there is no model folder")

    def test_output_that_another_threshold_has_begun(self, call, shards, clip_folder, tmp_path):
        options = ("--output", tmp_path / "o", "--model", clip_folder)
        assert call("rewrite", f"{shards}/00000.tar", *options, "--threshold", "0.1")[0] == 0
        more = (*options, "--threshold", "0.2")
        self.check(call, "rewrite", f"{shards}/*.tar", *more, says="threshold 0.1 there, 0.2 here")

    def test_output_that_another_model_has_begun(self, call, shards, clip_folder, tmp_path):
        other = make_clip(tmp_path / "other", seed=5)
        assert call("rewrite", f"{shards}/*.tar", "--output", tmp_path / "o", "--model", clip_folder)[0] == 0
        options = ("--output", tmp_path / "o", "--model", other)
        self.check(call, "rewrite", f"{shards}/*.tar", *options, says=f"model {clip_folder} there, {other} here")


@pytest.mark.slow
def test_a_terminal_gets_a_bar_and_a_pipe_does_not(shards, clip_folder, tmp_path):
    command = [*COMMAND, "rewrite", f"{shards}/*.tar", "--model", str(clip_folder), "--output"]
    piped = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stdout + piped.stderr

    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [*command, str(tmp_path / "b")], stdout=subprocess.DEVNULL, stderr=child, env=environment, close_fds=True
    )
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    assert b"/2 shards" in re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown)


def test_importing_the_package_imports_none_of_the_heavy_ones():
    code = "import sys, clipfilter_wds; print({'torch', 'lightning', 'ray', 'pandas', 'matplotlib'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
