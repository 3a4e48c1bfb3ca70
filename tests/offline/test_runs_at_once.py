"""Runs that write to one folder at the same time."""

import shutil
from pathlib import Path

import pytest

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.offline.tally import Phase, Tally
from tests.support.outputs import THRESHOLD, run
from tests.support.toys import pair, write_shard


@pytest.mark.parametrize(
    ("options", "phase"), [({}, Phase.SCORING), ({"samples_per_shard": 2}, Phase.COPYING)], ids=["copied", "packed"]
)
@pytest.mark.parametrize(("when", "what"), [(1, "00011"), (12, "00000")], ids=["before", "after"])
def test_two_runs_of_other_settings_do_not_mix_in_one_folder(scorer, tmp_path, options, phase, when, what):
    for number in range(12):
        write_shard(tmp_path / "in" / f"{number:05d}.tar", [pair(number), pair(number + 1)])
    run(scorer, f"{tmp_path}/in/*.tar", tmp_path / "other", threshold=-1, **options)
    theirs, out = [tmp_path / "other" / f"{what}{end}" for end in (".tar", "_stats.json")], tmp_path / "out"

    def let_the_other_write(tally: Tally) -> None:
        if tally.done == when and tally.phase is phase:
            for path in theirs:
                shutil.copy(path, out)

    config = RewriteConfig(
        shards=f"{tmp_path}/in/*.tar", output=out, threshold=-0.9, num_workers=2, batch_size=8, **options
    )
    with pytest.raises(ValueError, match=rf"{what}_stats.json' was written with .* -1\.0 there, -0\.9 here"):
        process_shards(config, scorer, on_progress=let_the_other_write)
    assert [(out / path.name).read_bytes() for path in theirs] == [path.read_bytes() for path in theirs]


def test_what_a_run_of_the_same_settings_has_done_meanwhile_stays(scorer, tmp_path):
    """Its mark must not vanish for a moment, since that run may be at its end and looking for it."""
    for number in range(3):
        write_shard(tmp_path / "in" / f"{number:05d}.tar", [pair(30 * number + index) for index in range(30)])
    options = {"threshold": THRESHOLD, "num_workers": 0, "batch_size": 8, "embeddings": "fp16"}
    config = RewriteConfig(shards=tmp_path / "in", output=tmp_path / "out", **options)
    found: list[dict[Path, int]] = []

    def find_marks() -> None:
        found.append({path: path.stat().st_ino for path in (tmp_path / "out").glob("*_stats.json")})

    def let_the_other_run(tally: Tally) -> None:
        if tally.num_scored and not found:
            process_shards(config, scorer)
            find_marks()

    tally = process_shards(config, scorer, on_progress=let_the_other_run)
    find_marks()
    assert (tally.done, tally.failed, len(found[0])) == (3, {}, 3)
    assert found[0] == found[1]


def test_two_runs_that_score_in_other_ways_do_not_mix_in_one_folder(scorer, tmp_path):
    for number in range(12):
        write_shard(tmp_path / "in" / f"{number:05d}.tar", [pair(number)])
    options = {"shards": tmp_path / "in", "num_workers": 0, "batch_size": 8}
    process_shards(ScoreConfig(output=tmp_path / "other", caption="json:none,txt", **options), scorer)
    theirs, out = tmp_path / "other/00011.parquet", tmp_path / "out"

    def let_the_other_write(tally: Tally) -> None:
        if tally.done == 1:
            shutil.copy(theirs, out)

    with pytest.raises(ValueError, match=r"00011.parquet' was written with other settings \(caption"):
        process_shards(ScoreConfig(output=out, **options), scorer, on_progress=let_the_other_write)
    assert (out / theirs.name).read_bytes() == theirs.read_bytes()
