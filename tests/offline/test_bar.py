"""What is shown of a run while it works."""

import pytest

from clipfilter_wds.offline.bar import kept_as, shown
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.tally import Phase, ShardStats, Tally
from clipfilter_wds.types import DropReason, FilterStats
from tests.support.toys import write_tar

EVERYTHING = {"keep_fraction": 0.3}


@pytest.mark.parametrize(
    ("command", "options", "phase", "share"),
    [
        (ScoreConfig, {}, Phase.SCORING, "75.0% scored"),
        (ScoreConfig, {}, Phase.WAITING, "75.0% scored"),
        (RewriteConfig, {}, Phase.SCORING, "75.0% kept"),
        (RewriteConfig, EVERYTHING, Phase.SCORING, "75.0% scored"),
        (RewriteConfig, {"samples_per_shard": 10}, Phase.SCORING, "75.0% scored"),
        (RewriteConfig, EVERYTHING, Phase.WAITING, None),
        (RewriteConfig, EVERYTHING, Phase.COPYING, "75.0% kept"),
    ],
)
def test_samples_are_said_to_be_kept_only_once_that_is_decided(tmp_path, command, options, phase, share):
    config = command(shards=write_tar(tmp_path / "in" / "0.tar", []), output=tmp_path / "out", **options)
    tally = Tally(num_shards=2, phase=phase)
    tally.add(ShardStats(counts=FilterStats(seen=4, kept=3, dropped={DropReason.BLANK_CAPTION: 1})))
    line = shown(tally, kept_as(config, tally.phase)).line
    assert line.startswith("1/2 shards, ")
    assert (share in line) if share is not None else ("%" not in line)
