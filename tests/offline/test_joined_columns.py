"""Columns that somebody joins to score tables, by which a rewrite chooses."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from tests.support.outputs import bits, check_accounting
from tests.support.toys import pair, write_shard


@pytest.fixture(scope="module")
def scored(scorer, tmp_path_factory):
    """A folder of shards, and of their scores."""
    folder = tmp_path_factory.mktemp("in")
    for shard in range(3):
        write_shard(folder / f"{shard:05d}.tar", [pair(100 * shard + i) for i in range(30)], start=1000 * shard)
    process_shards(ScoreConfig(shards=f"{folder}/*.tar", output=folder / "scores", num_workers=0), scorer)
    return folder


def join_weight(tables: list[Path], offset: int) -> None:
    """Give tables a column, or another one of that name; ``weight == 0`` holds for as many samples of each."""
    for path in tables:
        table = pq.read_table(path)
        plain = table.select([name for name in table.column_names if name != "weight"])
        weight = (table["index"].to_numpy() + offset) % 3
        pq.write_table(plain.append_column("weight", pa.array(weight)), path)


@pytest.mark.parametrize(
    "choice",
    [
        {"where": "weight == 0"},
        {"where": "weight == 0", "keep_fraction": 0.5},
        {"where": "weight == 0", "samples_per_shard": 100},
        {"group_by": "weight", "group_limits": "0=-1", "threshold": 1.0},
    ],
    ids=str,
)
def test_a_column_that_was_joined_anew_chooses_anew(scored, tmp_path, choice):
    tables = sorted(shutil.copytree(scored / "scores", tmp_path / "scores").glob("*.parquet"))

    def rewrite(output: str) -> dict:
        options = {"output": tmp_path / output, "scores": tmp_path / "scores", **choice}
        process_shards(RewriteConfig(shards=f"{scored}/*.tar", **options))
        return check_accounting(tmp_path / output)

    join_weight(tables, 0)
    rewrite("out")
    before = bits(tmp_path / "out")
    num_done = rewrite("out")["resumed_shards"]
    assert num_done == len(list((tmp_path / "out").glob("*_stats.json")))

    join_weight(tables[-1:], 1)
    assert rewrite("out")["resumed_shards"] < num_done
    rewrite("fresh")
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh") != before
