"""Options in YAML files: each test calls a command that does nothing."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


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
            ("group_limits: {en: 0.3, en: 0.5}", "en is given twice in x.yaml; keep one of them"),
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
        Path("page.yaml").write_text("a: b: c\n")
        why = "mapping values are not allowed here, in line 1, column 5"
        assert fails("rewrite", "--config", "page.yaml") == f"can't read --config page.yaml: {why}"

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
            "group_limits: {true: 0.3, null: 0, en: 1}\n"
        )
        run = configs("rewrite", "data/0.tar", "--output", "o", "--config", "x.yaml")[0]
        assert (run.columns, run.caption, run.group_limits) == (
            "json:a,json:ok=bool",
            "txt,json:alt",
            "true=0.3,null=0,en=1",
        )
