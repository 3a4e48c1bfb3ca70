"""Which run a report shows: only one of the scores that it is made of."""

import json
import shutil

import numpy as np
import pytest

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.report.findings import ScoredRun
from tests.report.conftest import THRESHOLD
from tests.support.score_tables import derive
from tests.support.toys import pair, write_shard


@pytest.fixture(scope="module")
def scores(run):
    return run.output / "_scores"


def rewritten(shards, scores, output, **options):
    process_shards(RewriteConfig(shards=f"{shards}/*.tar", output=output, scores=scores, num_workers=0, **options))
    return output


@pytest.mark.parametrize("options", [{"threshold": 0.1}, {"keep_fraction": 0.2}, {"samples_per_shard": 50}])
def test_a_rewrite_by_these_scores_is_shown_also_where_shards_and_tables_have_moved(run, scores, tmp_path, options):
    output = rewritten(run.shards, scores, tmp_path / "out", **options)
    summary = json.loads((output / "summary.json").read_bytes())
    assert ScoredRun.open(scores, run=output).summary == summary
    moved = shutil.copytree(scores, tmp_path / "moved")
    assert ScoredRun.open(moved, run=output).summary == summary
    assert ScoredRun.open(run.output, run=run.output).summary["threshold"] == THRESHOLD


def test_a_rewrite_of_some_of_the_shards_is_one_of_these_scores(run, scores, tmp_path):
    process_shards(RewriteConfig(shards=run.shards / "00003.tar", output=tmp_path, scores=scores, num_workers=0))
    assert ScoredRun.open(scores, run=tmp_path).summary["shards"] == 1


def test_a_folder_without_a_rewrite_is_refused(run, command, scorer, scores, tmp_path):
    write_shard(tmp_path / "0.tar", [pair(0)])
    process_shards(ScoreConfig(shards=tmp_path / "0.tar", output=tmp_path / "scores", num_workers=0), scorer)
    for folder, complaint in [("nowhere", "has no summary.json"), ("scores", "is no rewrite's")]:
        arguments = ("report", scores, "--run", tmp_path / folder, "-o", tmp_path / "r.html")
        code, said = command(*arguments)
        assert code == 2
        assert f"run '{tmp_path / folder}' {complaint}" in said
        assert "name the output folder of a rewrite that chose by these scores" in said
    assert not (tmp_path / "r.html").exists()


def test_a_rewrite_by_other_scores_is_refused(run, scores, tmp_path):
    other = derive(shutil.copytree(scores, tmp_path / "scores"), "loss", np.negative)
    output = rewritten(run.shards, other, tmp_path / "out", threshold=0)
    with pytest.raises(ValueError, match=r"is of other scores than .*score loss there, cosine here.*; name the output"):
        ScoredRun.open(scores, run=output)
    assert ScoredRun.open(other, run=output).summary["threshold"] == 0


@pytest.mark.parametrize("options", [{}, {"samples_per_shard": 50}], ids=["copied", "packed"])
def test_a_rewrite_of_other_shards_is_refused_whatever_they_are_called(scorer, scores, tmp_path, options):
    for name in ("00000.tar", "other.tar"):
        write_shard(tmp_path / "in" / name, [pair(index) for index in range(3)])
    config = RewriteConfig(shards=tmp_path / "in", output=tmp_path / "out", threshold=-1, num_workers=0, **options)
    process_shards(config, scorer)
    with pytest.raises(ValueError, match="is of other shards than the tables in"):
        ScoredRun.open(scores, run=tmp_path / "out")


def test_files_of_img2dataset_are_no_marks_of_a_run(run, scores, tmp_path):
    output = rewritten(run.shards, scores, tmp_path / "out")
    (output / "_0_stats.json").write_text('{"successes": 1}')
    assert ScoredRun.open(scores, run=output).summary["shards"] == 8


def test_the_output_of_a_rewrite_by_scores_says_how_to_report_on_it(run, command, scores, tmp_path):
    output = rewritten(run.shards, scores, tmp_path / "a b")
    code, said = command("report", output, "-o", tmp_path / "r.html")
    assert code == 2
    assert f"there is no score table in '{output}': its rewrite chose by scores that were made before" in said
    assert f"`clipfilter-wds report SCORES --run '{output}'`" in said
    assert command("report", scores, "--run", output, "-o", tmp_path / "r.html")[0] == 0
