"""Score once, choose later: rewriting from score tables that were made before."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.table import ShardScores
from tests.support.outputs import bits, check_accounting, run
from tests.support.pace import FOREVER
from tests.support.score_tables import derive
from tests.support.toys import pair, tar_members, write_shard, write_tar


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for shard in range(3):
        samples = [{**pair(100 * shard + i), "json": b'{"i": %d}' % i} for i in range(30)]
        samples[7] = {"jpg": b"no image", "txt": b"a caption"}
        write_shard(folder / f"{shard:05d}.tar", samples, start=1000 * shard)
    return folder


@pytest.fixture(scope="module")
def scores(scorer, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    process_shards(ScoreConfig(shards=f"{shards}/*.tar", output=folder, batch_size=8, num_workers=0), scorer)
    return folder


def from_scores(shards, output, scores, **options) -> dict:
    """The summary of a run without a model."""
    process_shards(RewriteConfig(shards=f"{shards}/*.tar", output=output, scores=scores, **options))
    return check_accounting(output)


@pytest.fixture(scope="module")
def told(shards, scorer, scores):
    """Run ``rewrite --scores`` with these options; see ``command``."""

    def told(command, output, *options) -> tuple[int, str]:
        return command("rewrite", shards, "--scores", scores, "--output", output, "--num_workers", 0, *options)

    return told


def test_nothing_is_written_beside_the_scores(command, told, scores):
    before, summary = bits(scores), (scores / "summary.json").read_bytes()
    code, said = told(command, scores / ".." / scores.name)
    assert code == 2
    assert "is the folder of the scores, which have a summary; choose another" in said
    assert (bits(scores), (scores / "summary.json").read_bytes()) == (before, summary)


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ("--model openai/clip-vit-large-patch14", "model {model} there, openai/clip-vit-large-patch14 here"),
        ("--precision bf16", "precision fp32 there, bf16 here"),
        ("--reduce min", "reduce max there, min here"),
        ("--flip --fast_decode", "flip false there, true here; fast_decode false there, true here"),
        ("--resize_on_device", "resize_on_device false there, true here"),
        ("--caption json:x --image png", "caption txt there, json:x here; image null there, png here"),
    ],
)
@pytest.mark.parametrize("trial", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_options_that_score_otherwise_than_the_tables_are_refused(
    command, told, clip_folder, tmp_path, options, differ, trial
):
    code, said = told(command, tmp_path / "out", *options.split(), *trial)
    assert code == 2
    assert f"were made with other settings ({differ.format(model=clip_folder)}), and are taken as they are;" in said
    assert "leave these options out, or score again with them" in said
    assert not (tmp_path / "out").exists()


def test_what_the_tables_were_made_with_may_be_said_as_in_a_file_for_both_commands(
    command, shards, clip_folder, tmp_path
):
    config = tmp_path / "both.yaml"
    config.write_text(
        f"shards: {shards}\nmodel: {clip_folder}\nprecision: fp32\nflip: true\ncaption: json:i,txt\nbatch_size: 8\n"
        "num_workers: 0\ndevice: cpu\ncuda_graphs: false\n"
    )
    assert command("score", "--config", config, "--output", tmp_path / "scores")[0] == 0
    code, said = command("rewrite", "--config", config, "--output", tmp_path / "out", "--scores", tmp_path / "scores")
    assert code == 0, said


def test_where_the_caption_is_differs_in_python_too(shards, scores, tmp_path):
    with pytest.raises(ValueError, match="caption txt there, json:x here"):
        from_scores(shards, tmp_path, scores, caption="json:x")


def without_tables(output) -> dict[str, str]:
    return {name: digest for name, digest in bits(output).items() if not name.startswith("_scores")}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sweep_over_thresholds_gives_what_fresh_runs_give(scorer, shards, scores, tmp_path, num_workers):
    thresholds = [number / 50 for number in range(20)] if not num_workers else [0.12]
    kept = []
    for threshold in thresholds:
        fresh, later = tmp_path / f"fresh{threshold}", tmp_path / f"later{threshold}"
        run(scorer, f"{shards}/*.tar", fresh, threshold=threshold)
        summary = from_scores(shards, later, scores, threshold=threshold, num_workers=num_workers)
        assert without_tables(later) == without_tables(fresh)
        kept.append(summary["kept"])
    assert kept == sorted(kept, reverse=True)
    assert num_workers or len(set(kept)) > 5


def test_kept_members_are_copied_with_the_headers_that_they_have(scorer, tmp_path):
    (tmp_path / "in").mkdir()
    with webdataset.TarWriter(str(tmp_path / "in/0.tar")) as tar:  # gives each member a time and an owner
        for number in range(6):
            tar.write({"__key__": f"{number:04d}", **pair(number)})
    process_shards(ScoreConfig(shards=f"{tmp_path}/in/*.tar", output=tmp_path / "scores", num_workers=0), scorer)
    run(scorer, f"{tmp_path}/in/*.tar", tmp_path / "fresh", threshold=-1)
    from_scores(tmp_path / "in", tmp_path / "later", tmp_path / "scores", threshold=-1)
    copied = (tmp_path / "later/0.tar").read_bytes()
    assert copied == (tmp_path / "fresh/0.tar").read_bytes() == (tmp_path / "in/0.tar").read_bytes()


MODULES_OF_A_REWRITE = """
import sys
from clipfilter_wds.cli import main

shards, scores, output = sys.argv[1:]
try:
    main(["rewrite", shards, "--scores", scores, "--output", output, "--threshold", "0.25", "--quiet"])
finally:
    print(*{"PIL", "torch", "torchvision", "transformers", "ray"} & set(sys.modules))
"""


def test_no_model_and_no_library_of_models_or_images_is_loaded(shards, scores, tmp_path):
    command = [sys.executable, "-c", MODULES_OF_A_REWRITE, f"{shards}/*.tar", scores, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=FOREVER)
    assert done.stdout.split() == []
    assert check_accounting(tmp_path / "out")["seen"] == 90


def test_shards_without_a_table_and_shards_that_changed_fail_alone(shards, scores, tmp_path):
    shutil.copytree(shards, tmp_path / "in")
    write_shard(tmp_path / "in/00001.tar", [pair(i) for i in range(5)])
    write_shard(tmp_path / "in/new.tar", [pair(5)])
    summary = from_scores(tmp_path / "in", tmp_path / "out", scores, threshold=-1)
    failed = {url.rpartition("/")[2]: why for url, why in summary["failed_shards"].items()}
    assert set(failed) == {"00001.tar", "new.tar"}
    before, now = ((folder / "00001.tar").stat().st_size for folder in (shards, tmp_path / "in"))
    assert f"{now} bytes here, {before} in" in failed["00001.tar"]
    assert "score it first" in failed["new.tar"]
    assert (summary["seen"], summary["kept"]) == (60, 58)


def test_a_shard_of_the_same_size_with_other_samples_is_refused(shards, scores, tmp_path):
    members = tar_members(shards / "00000.tar")
    other_keys = [(f"9{name[1:]}", data) for name, data in members]
    one_less = [("000000028.x" + name[-3:] if name.startswith("000000029") else name, data) for name, data in members]
    (tmp_path / "scores").mkdir()
    for name, changed in (("a", other_keys), ("b", one_less)):
        path = write_tar(tmp_path / "in" / f"{name}.tar", changed)
        assert path.stat().st_size == (shards / "00000.tar").stat().st_size
        shutil.copy(scores / "00000.parquet", tmp_path / "scores" / f"{name}.parquet")
    summary = from_scores(tmp_path / "in", tmp_path / "out", tmp_path / "scores", threshold=-1)
    failed = {url.rpartition("/")[2]: why for url, why in summary["failed_shards"].items()}
    assert failed == {
        "a.tar": "its sample 0 is '900000000', and '000000000' was scored",
        "b.tar": "it holds 29 samples, and 30 were scored",
    }
    assert summary["seen"] == 0
    assert not list((tmp_path / "out").glob("*.tar"))


def test_tables_of_different_models_are_refused_with_both_values(shards, scores, tmp_path):
    from clipfilter_wds.models.scorer import ClipScorer
    from tests.support.toys import make_clip

    shutil.copytree(scores, tmp_path / "scores")
    other = ClipScorer(make_clip(tmp_path / "other", seed=5), device="cpu")
    process_shards(ScoreConfig(shards=f"{shards}/00002.tar", output=tmp_path / "b", num_workers=0), other)
    shutil.copy(tmp_path / "b/00002.parquet", tmp_path / "scores")
    with pytest.raises(ValueError, match=r"model .*other there, .*clip-32 here"):
        from_scores(shards, tmp_path / "out", tmp_path / "scores")


def test_a_run_from_scores_resumes_where_it_was(shards, scores, tmp_path):
    from_scores(shards, tmp_path / "out", scores, threshold=0.12)
    before = bits(tmp_path / "out")
    (tmp_path / "out/00001_stats.json").unlink()
    assert from_scores(shards, tmp_path / "out", scores, threshold=0.12)["resumed_shards"] == 2
    assert bits(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"threshold 0\.12 there, 0\.2 here"):
        from_scores(shards, tmp_path / "out", scores, threshold=0.2)


def test_the_summary_names_what_made_the_scores(scorer, shards, scores, tmp_path):
    from_scores(shards, tmp_path / "out", scores)
    summary = json.loads((tmp_path / "out/summary.json").read_bytes())
    assert (summary["model"], summary["precision"], summary["scored"]) == (scorer.model_name, "fp32", 0)
    assert summary["scores"] == str(scores)


@pytest.mark.parametrize("choice", [{"threshold": 0.12}, {"keep_fraction": 0.5}])
def test_samples_within_the_error_band_of_the_cut_are_counted(shards, scores, tmp_path, choice):
    band, cosines = 0.02, []
    for path in scores.glob("*.parquet"):
        table = ShardScores.read(path)
        cosines += table.scores[table.usable].tolist()
        (tmp_path / "scores").mkdir(exist_ok=True)
        with (tmp_path / "scores" / path.name).open("wb") as file:
            replace(table, metadata=replace(table.metadata, band=band)).write(file)
    summary = from_scores(shards, tmp_path / "out", tmp_path / "scores", **choice)
    limit = choice.get("threshold") or sorted(cosines)[-summary["kept"]]
    assert summary["in_band"] == sum(abs(cosine - limit) <= band for cosine in cosines) > 0
    assert summary["band"] == band
    assert from_scores(shards, tmp_path / "exact", scores, **choice)["in_band"] == 0


@pytest.fixture
def losses(scores, tmp_path) -> Path:
    """Score tables of another kind: three times what the cosines lack to 0.5."""
    folder = shutil.copytree(scores, tmp_path / "losses")
    return derive(folder, "loss", lambda cosines: 3 * (cosines - np.float32(0.5)), limits=(None, 0.0))


def test_scores_of_another_kind_are_neither_clipped_nor_given_a_threshold(shards, losses, tmp_path):
    with pytest.raises(ValueError, match="of kind 'loss', which has no usual threshold; give a threshold"):
        RewriteConfig(shards=f"{shards}/*.tar", output=tmp_path / "out", scores=losses)
    with pytest.raises(ValueError, match="a score of kind 'loss' lies in"):
        RewriteConfig(shards=f"{shards}/*.tar", output=tmp_path / "out", scores=losses, threshold=0.1)
    tables = [ShardScores.read(path) for path in losses.rglob("*.parquet")]
    usable = np.concatenate([table.scores[table.usable] for table in tables])
    threshold = float(np.median(usable))
    assert threshold < -1
    summary = from_scores(shards, tmp_path / "out", losses, threshold=threshold)
    assert summary["kept"] == (usable.astype(np.float64) >= threshold).sum() > 0
    assert summary["dropped"]["below_threshold"] > 0


def test_a_fraction_of_scores_of_another_kind_is_that_of_the_cosines_they_were_made_of(
    shards, scores, losses, tmp_path
):
    from_scores(shards, tmp_path / "cosines", scores, keep_fraction=0.4)
    from_scores(shards, tmp_path / "by_losses", losses, keep_fraction=0.4)
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        assert (tmp_path / "by_losses" / name).read_bytes() == (tmp_path / "cosines" / name).read_bytes()


def test_a_condition_on_the_columns_chooses_among_all(scorer, shards, scores, tmp_path):
    condition = "index >= 5 and num_tokens > 3"
    summary = from_scores(shards, tmp_path / "later", scores, where=condition)
    assert summary["where"] == condition
    assert summary["dropped"] == {"unreadable_image": 3, "not_selected": 15}
    run(scorer, f"{shards}/*.tar", tmp_path / "fresh", where=condition, threshold=-1)
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        assert (tmp_path / "fresh" / name).read_bytes() == (tmp_path / "later" / name).read_bytes()
    summary = from_scores(shards, tmp_path / "half", scores, where=condition, keep_fraction=0.5)
    assert summary["kept"] == round(0.5 * 3 * 24)
    with pytest.raises(ValueError, match=r"where index >= 5 .* there, null here"):
        from_scores(shards, tmp_path / "later", scores, threshold=0.1)
    with pytest.raises(ValueError, match="there is no column 'wdith'; the tables have key, index"):
        RewriteConfig(shards=f"{shards}/*.tar", output=tmp_path / "none", where="wdith > 3", scores=scores)
