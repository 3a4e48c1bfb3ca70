"""Which folders of scores a report compares: of the same shards, no fewer and no more."""

import shutil
from dataclasses import replace

import pytest

from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.run import write_report
from clipfilter_wds.scores.table import ShardScores
from tests.support.score_tables import written


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
