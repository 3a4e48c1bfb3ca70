"""Two folders of scores side by side: of the same shards, no fewer and no more."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.run import write_report
from clipfilter_wds.scores.table import ShardScores
from tests.report.conftest import THRESHOLD
from tests.support.score_tables import derive, written
from tests.support.toys import pair, write_shard


@pytest.fixture
def folders(run, tmp_path):
    """Two copies of the same tables."""
    return [shutil.copytree(run.output / "_scores", tmp_path / name) for name in ("here", "there")]


def compare(here, there, tmp_path):
    return write_report(ReportConfig(scores=here, compare=there, output=tmp_path / "r.html", thumbnails=0))


@pytest.mark.parametrize(("num_lacking", "more"), [(1, ""), (3, " and 2 more")])
def test_a_folder_of_more_shards_is_refused(folders, tmp_path, num_lacking, more):
    """Its ranks would be among samples that are not compared."""
    here, there = folders
    for path in sorted(here.glob("*.parquet"))[:num_lacking]:
        path.unlink()
    says = rf"/there/00000.parquet'{more} has no counterpart in '.*/here'; compare scores of the same shards"
    with pytest.raises(ValueError, match=says):
        compare(here, there, tmp_path)


def test_a_folder_of_fewer_shards_is_refused(folders, tmp_path):
    here, there = folders
    (there / "00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"there' has no scores of the shard of '.*/here/00003.parquet'"):
        compare(here, there, tmp_path)


def test_scores_of_shards_with_other_members_of_the_same_names_are_refused(folders, tmp_path):
    here, there = folders
    path = there / "00003.parquet"
    found = ShardScores.read(path)
    assert found.metadata.signature is not None
    path.write_bytes(written(replace(found, metadata=replace(found.metadata, signature="0" * 32))))
    with pytest.raises(ValueError, match=r"there/00003.parquet' and '.*/here/00003.parquet' are of different shards"):
        compare(here, there, tmp_path)
    path.write_bytes(written(replace(found, metadata=replace(found.metadata, signature=None, storage_version=None))))
    compare(here, there, tmp_path)


@pytest.mark.parametrize("scale", [1.0, -2.0], ids=["same order", "reversed"])
def test_a_comparison_says_how_many_move_and_shows_which_most(run, tmp_path, scale):
    folder = shutil.copytree(run.output / "_scores", tmp_path / "scores")
    derive(folder, "loss", lambda cosines: np.float32(scale) * cosines)
    config = ReportConfig(
        scores=run.output, output=tmp_path / "r.html", compare=folder, shards=f"{run.shards}/*.tar", thumbnails=5
    )
    write_report(config)
    page = (tmp_path / "r.html").read_text()
    [section] = re.findall(r"<h2>Compared with loss</h2>(.*?)</section>", page, flags=re.DOTALL)
    both, only_here, only_there, neither = (int(number) for number in re.findall(r"<td>(\d+)</td>", section))
    scores = run.all_scores().astype(np.float64)
    here = scores >= THRESHOLD
    there = np.argsort(np.argsort(-scale * scores, kind="stable")) < here.sum()
    assert (both, only_here) == ((here & there).sum(), (here & ~there).sum())
    assert both + only_here == both + only_there == run.kept(THRESHOLD)
    assert both + only_here + only_there + neither == sum(len(table.scores) for table in run.tables)
    risen, fallen = section.split("<h3>Rank lower there</h3>")
    if scale > 0:
        assert only_here == only_there == 0
    else:
        assert risen.count("data:image/jpeg;base64") == fallen.count("data:image/jpeg;base64") == 12
        lowest = scores[:12]
        shown = [float(text) for text in re.findall(r'class="score">(\S+) here', risen)]
        np.testing.assert_allclose(np.sort(shown), lowest, atol=1e-4)
    assert "<script>alert" not in section


def test_scores_of_other_shards_are_not_compared(run, scorer, tmp_path):
    write_shard(tmp_path / "other.tar", [pair(1)])
    process_shards(ScoreConfig(shards=tmp_path / "other.tar", output=tmp_path / "scores", num_workers=0), scorer)
    with pytest.raises(ValueError, match="has no scores of the shard of"):
        compare(run.output, tmp_path / "scores", tmp_path)
