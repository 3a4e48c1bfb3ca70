"""``limit``, ``dry_run`` and ``overwrite``."""

import re
from pathlib import Path

import pytest

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline import dry_run
from clipfilter_wds.offline import run as run_of_shards
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.dry_run import describe_run
from clipfilter_wds.offline.overwrite import remove_others
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.precomputed import FolderLookup
from clipfilter_wds.world import World
from tests.support.outputs import THRESHOLD, bits
from tests.support.toys import pair, write_shard

NUM_SHARDS, PER_SHARD = 3, 10
NOTHING_LEFT = "all of it was done by an earlier run; nothing would be written"
OPTIONS = {"num_workers": 0, "batch_size": 4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    for shard in range(NUM_SHARDS):
        write_shard(folder / f"{shard:05d}.tar", [pair(10 * shard + i) for i in range(PER_SHARD)])
    return folder


def score(scorer, shards, output, **options):
    return process_shards(ScoreConfig(shards=shards, output=output, **OPTIONS, **options), scorer)


def rewrite(scorer, shards, output, threshold=THRESHOLD, **options):
    config = RewriteConfig(shards=shards, output=output, threshold=threshold, **OPTIONS, **options)
    return process_shards(config, scorer)


class TestLimit:
    @pytest.mark.parametrize(("limit", "per_shard"), [(4, [4]), (10, [10]), (13, [10, 3]), (99, [10, 10, 10])])
    def test_the_first_samples_are_scored_as_in_a_full_run(self, scorer, shards, tmp_path, limit, per_shard):
        score(scorer, shards, tmp_path / "full")
        tally = score(scorer, shards, tmp_path / "trial", limit=limit)
        assert tally.counts.kept == sum(per_shard)
        assert tally.counts.seen == PER_SHARD * len(per_shard)
        assert tally.counts.dropped.get("not_in_subset", 0) == tally.counts.seen - tally.counts.kept
        tables = sorted((tmp_path / "trial").glob("*.parquet"))
        assert len(tables) == len(per_shard)
        for table, num in zip(tables, per_shard, strict=True):
            trial, full = ShardScores.read(table), ShardScores.read(tmp_path / "full" / table.name)
            assert trial.usable.tolist() == [index < num for index in range(PER_SHARD)]
            assert trial.scores[:num].tolist() == full.scores[:num].tolist()

    def test_it_is_never_taken_for_a_full_run(self, scorer, shards, tmp_path):
        trial = tmp_path / "trial"
        score(scorer, shards, trial, limit=13)
        with pytest.raises(ValueError, match="limit 13 there, null here"):
            score(scorer, shards, trial)
        with pytest.raises(ValueError, match="a trial on the first 13 samples; score without --limit"):
            rewrite(None, shards, tmp_path / "kept", scores=trial)
        with pytest.raises(ValueError, match="a trial on the first 13 samples"):
            FolderLookup.of(ScoreFolder(trial), [], SampleLayout(), None)
        rewrite(scorer, shards, tmp_path / "tried", limit=13)
        with pytest.raises(ValueError, match="limit 13 there, null here"):
            rewrite(scorer, shards, tmp_path / "tried")

    def test_a_shard_that_cannot_be_read_fails_and_the_next_ones_are_tried(self, scorer, tmp_path):
        (tmp_path / "a.tar").write_bytes(b"garbage" * 1000)
        write_shard(tmp_path / "b.tar", [pair(i) for i in range(5)])
        tally = score(scorer, tmp_path, tmp_path / "out", limit=3)
        assert (tally.counts.kept, list(tally.failed)) == (3, [f"{tmp_path}/a.tar"])

    def test_it_must_be_positive_and_is_not_for_scores_that_are_there(self, shards, tmp_path):
        with pytest.raises(ValueError, match="limit is 0; it must be at least 1"):
            ScoreConfig(shards=shards, output=tmp_path / "out", limit=0)
        with pytest.raises(ValueError, match="limit says what is scored, and scores"):
            RewriteConfig(shards=shards, output=tmp_path / "out", limit=3, scores=tmp_path)


class TestDryRun:
    def test_it_says_what_would_be_read_and_writes_nothing(self, scorer, shards, tmp_path):
        out = tmp_path / "out"
        said = list(describe_run(ScoreConfig(shards=shards, output=out, dry_run=True)))
        num_bytes = sum(path.stat().st_size for path in shards.iterdir())
        assert said[0] == f"would read 3 shards, {num_bytes / 1e3:,.1f} kB"
        assert said[1] == f"would score all of it, and write score tables to {out}"
        assert not out.exists()

    @pytest.mark.parametrize(("num_bytes", "shown"), [(0, "0.0 kB"), (1_460_000, "1.5 MB"), (2.5e12, "2,500.0 GB")])
    def test_sizes_are_shown_in_units_of_their_own(self, num_bytes, shown):
        assert dry_run._size(num_bytes) == shown

    def test_of_a_trial_it_says_how_many_samples_would_be_scored(self, shards, tmp_path):
        said = list(describe_run(ScoreConfig(shards=shards, output=tmp_path / "out", limit=15)))
        assert said[0].startswith("would read 2 shards, ")
        assert said[1] == f"would score the first 15 samples, and write score tables to {tmp_path / 'out'}"

    @pytest.mark.parametrize("options", [{}, {"threshold": THRESHOLD}, {"keep_fraction": 0.3}], ids=str)
    def test_it_says_what_an_earlier_run_has_done(self, scorer, shards, tmp_path, options):
        out = tmp_path / "out"

        def config(shards):
            kind = RewriteConfig if options else ScoreConfig
            return kind(shards=shards, output=out, **options, **OPTIONS)

        process_shards(config(shards / "00000.tar"), scorer)
        before = bits(out)
        said = list(describe_run(config(shards)))
        assert said[1].startswith("would score 2 shards of it, and write ")
        assert said[2] == "done by an earlier run, and stays: 1 shard"
        assert bits(out) == before
        process_shards(config(shards), scorer)
        last = "all of it is scored by an earlier run; would choose " if "keep_fraction" in options else NOTHING_LEFT
        assert list(describe_run(config(shards)))[-1].startswith(last)

    def test_shards_that_are_scored_and_not_copied_are_told_of(self, scorer, shards, tmp_path):
        rewrite(scorer, shards, tmp_path / "out")
        (tmp_path / "out/00001_stats.json").unlink()
        config = RewriteConfig(shards=shards, output=tmp_path / "out", threshold=THRESHOLD, **OPTIONS)
        assert list(describe_run(config))[1:] == [
            "scored by an earlier run, and would be copied from: 1 shard",
            "done by an earlier run, and stays: 2 shards",
        ]

    @pytest.mark.parametrize(
        ("first", "then", "says"),
        [
            ("--threshold 0.28", "--threshold 0.3", "threshold 0.28 there, 0.3 here"),
            ("--threshold 0.1", "--threshold 0.1 --flip", "flip false there, true here"),
            ("--threshold 0.1", "--threshold 0.1 --caption json:a", "caption txt there, json:a here"),
            ("--threshold 0.1 --limit 5", "--threshold 0.1", "limit 5 there, null here"),
            ("--keep_fraction 0.5", "--keep_fraction 0.3", "keep_fraction 0.5 there, 0.3 here"),
            ("--columns json:a", "--columns json:a=text", "has the column 'a' as number, and text is asked for"),
            ("--embeddings fp16", "--embeddings fp32", "has embeddings in fp16, and fp32 is asked for"),
        ],
    )
    def test_it_refuses_what_the_run_refuses_and_says_what_overwrite_would_delete(
        self, command, clip_folder, shards, tmp_path, monkeypatch, first, then, says
    ):
        run = ["rewrite", shards, "-o", tmp_path / "out", "--model", clip_folder, "--num_workers", 0, "--device", "cpu"]
        assert command(*run, *first.split())[0] == 0
        before = bits(tmp_path / "out")
        for trial in (["--dry_run"], []):
            code, said = command(*run, *then.split(), *trial)
            assert (code, says in said, "--overwrite" in said) == (2, True, True), said
        code, said = command(*run, *then.split(), "--dry_run", "--overwrite")
        assert code == 0
        assert bits(tmp_path / "out") == before
        [told] = re.findall("^would delete (.*) of other settings$", said, re.MULTILINE)
        deleted = []

        def remove(config, fingerprint) -> None:
            remove_others(config, fingerprint)
            deleted.extend(before.keys() - bits(tmp_path / "out").keys())

        monkeypatch.setattr(run_of_shards, "remove_others", remove)
        assert command(*run, *then.split(), "--overwrite")[0] == 0
        num_outputs = sum(name.endswith((".parquet", "_stats.json")) for name in deleted)
        assert sum(map(int, re.findall(r"(\d+) (?:shard|score table)", told))) == num_outputs > 0

    def test_with_scores_too(self, scorer, command, shards, tmp_path):
        score(scorer, shards, tmp_path / "scores")
        run = ["rewrite", shards, "-o", tmp_path / "out", "--scores", tmp_path / "scores", "--num_workers", 0]
        command(*run, "--threshold", 0.1)
        before = bits(tmp_path / "out")
        assert NOTHING_LEFT in command(*run, "--threshold", 0.1, "--dry_run")[1]
        for trial in (["--dry_run"], []):
            code, said = command(*run, "--threshold", 0.12, *trial)
            assert (code, "threshold 0.1 there, 0.12 here" in said) == (2, True)
        code, said = command(*run, "--threshold", 0.12, "--dry_run", "--overwrite")
        assert (code, "would delete 3 shards of other settings\n" in said) == (0, True)
        assert bits(tmp_path / "out") == before

    def test_another_name_of_the_model_is_told_of(self, command, scorer, shards, tmp_path):
        score(scorer, shards, tmp_path / "out")
        _, said = command("score", shards, "-o", tmp_path / "out", "--model", "some/other", "--dry_run")
        assert f"was written with the model {scorer.model_name}; if the weights of some/other are others, that" in said

    def test_an_output_that_is_a_file_is_refused(self, command, shards, tmp_path):
        (tmp_path / "out").touch()
        code, said = command("score", shards, "-o", tmp_path / "out", "--dry_run")
        assert (code, "can't write to output" in said) == (2, True)

    @pytest.mark.parametrize(
        "choice", [{"threshold": THRESHOLD}, {"keep_fraction": 0.3}, {"keep_fraction": 0.3, "samples_per_shard": 2}]
    )
    def test_what_it_says_of_scores_is_what_the_run_does(self, scorer, shards, tmp_path, choice):
        score(scorer, shards, tmp_path / "scores")
        config = {"shards": shards, "output": tmp_path / "out", "scores": tmp_path / "scores", **choice}
        said = "\n".join(describe_run(RewriteConfig(**config, dry_run=True)))
        assert not (tmp_path / "out").exists()
        counts = process_shards(RewriteConfig(**config, num_workers=0)).counts
        num_tars = len(list((tmp_path / "out").glob("*.tar")))
        assert f"would keep {counts.kept} of {counts.seen} samples ({counts.kept / counts.seen:.1%})" in said
        assert f"would write {num_tars} shards to {tmp_path / 'out'}" in said

    def test_the_command_prints_it(self, command, shards, tmp_path):
        code, out = command("score", shards, "--output", tmp_path / "out", "--dry_run")
        assert code == 0
        assert re.match("would read 3 shards", out)
        assert not (tmp_path / "out").exists()

    def test_a_run_of_such_a_config_is_refused(self, scorer, shards, tmp_path):
        with pytest.raises(ValueError, match="dry_run is True, so nothing can be written"):
            score(scorer, shards, tmp_path / "out", dry_run=True)


class TestOverwrite:
    def test_the_outcome_is_that_of_an_empty_folder_and_other_files_stay(self, scorer, shards, tmp_path):
        rewrite(scorer, shards, tmp_path / "new", threshold=0.2)
        out = tmp_path / "out"
        rewrite(scorer, shards, out, threshold=0.0, caption="json:none,txt")
        others = {"notes.txt": b"mine", "other.tar": b"tar", "00000_stats.json.bak": b"{}", "img_stats.json": b"{}"}
        others |= {"_scores/mine.parquet": b"no table"}
        for name, data in others.items():
            (out / name).write_bytes(data)
        with pytest.raises(ValueError, match="choose another folder, or delete what is there with --overwrite"):
            rewrite(scorer, shards, out, threshold=0.2)
        rewrite(scorer, shards, out, threshold=0.2, overwrite=True)
        for name, data in others.items():
            assert (out / name).read_bytes() == data
            (out / name).unlink()
        assert bits(out) == bits(tmp_path / "new")

    def test_outputs_of_shards_that_are_not_in_this_run_go_too(self, scorer, shards, tmp_path):
        rewrite(scorer, shards, tmp_path / "out", threshold=0.0)
        rewrite(scorer, shards / "00001.tar", tmp_path / "out", threshold=0.2, overwrite=True)
        rewrite(scorer, shards / "00001.tar", tmp_path / "new", threshold=0.2)
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert not {"00000.tar", "00000_stats.json", "00002.tar"} & names
        assert bits(tmp_path / "out").keys() - bits(tmp_path / "new").keys() <= {
            "_scores/00000.parquet",
            "_scores/00002.parquet",
        }

    def test_what_the_same_settings_have_written_is_resumed(self, scorer, shards, tmp_path):
        rewrite(scorer, shards / "00000.tar", tmp_path / "out", overwrite=True)
        assert rewrite(scorer, shards, tmp_path / "out", overwrite=True).resumed == 1

    def test_score_tables_and_embeddings(self, scorer, shards, tmp_path):
        score(scorer, shards, tmp_path / "out", limit=13, embeddings="fp16")
        score(scorer, shards, tmp_path / "out", overwrite=True)
        score(scorer, shards, tmp_path / "new")
        assert bits(tmp_path / "out") == bits(tmp_path / "new")

    def test_another_batch_size_in_low_precision(self, clip_folder, shards, tmp_path):
        bf16 = ClipScorer(clip_folder, device="cpu", precision="bf16")
        for output, options in (("out", {"batch_size": 4}), ("new", {"batch_size": 8})):
            process_shards(ScoreConfig(shards=shards, output=tmp_path / output, num_workers=0, **options), bf16)
        config = {"shards": shards, "output": tmp_path / "out", "num_workers": 0, "batch_size": 8}
        with pytest.raises(ValueError, match=r"batch_size 4 there, 8 here\); .* --overwrite"):
            process_shards(ScoreConfig(**config), bf16)
        process_shards(ScoreConfig(**config, overwrite=True), bf16)
        assert bits(tmp_path / "out") == bits(tmp_path / "new")

    def test_scores_that_are_read_stay(self, scorer, shards, tmp_path):
        rewrite(scorer, shards, tmp_path / "out", threshold=0.0)
        tables = bits(tmp_path / "out" / "_scores")
        rewrite(None, shards, tmp_path / "out", threshold=0.2, scores=tmp_path / "out", overwrite=True)
        assert bits(tmp_path / "out" / "_scores") == tables

    def test_several_ranks_are_refused(self, scorer, shards, tmp_path):
        config = ScoreConfig(shards=shards, output=tmp_path / "out", overwrite=True)
        with pytest.raises(ValueError, match="overwrite is for one process"):
            process_shards(config, scorer, world=World(rank=0, world_size=2))
