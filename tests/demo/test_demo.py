import json
import re
import subprocess
import sys

from PIL import Image

from clipfilter_wds.demo.run import demo_threshold
from clipfilter_wds.demo.shards import write_demo_shards
from tests.support.outputs import check_accounting
from tests.support.pace import cpu_seconds_of_children
from tests.support.toys import tar_members


def test_demo_runs_within_a_minute_and_finds_the_truth(tmp_path):
    began = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "clipfilter_wds", "demo", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert cpu_seconds_of_children() - began < 60
    out = " ".join(done.stdout.split())
    precision, recall = (float(value) for value in re.search(r"precision ([\d.]+), recall ([\d.]+)", out).groups())
    assert precision > 0.95
    assert recall > 0.95

    summary = check_accounting(tmp_path / "filtered")
    assert summary["threshold"] == demo_threshold()
    dropped = {reason: count for reason, count in summary["dropped"].items() if reason != "below_threshold"}
    assert dropped == {"blank_caption": 1, "missing_caption": 1, "unreadable_image": 2, "torn": 1}
    assert f"seen {summary['seen']:,}" in out
    assert Image.open(tmp_path / "overview.png").width > 500


def test_demo_shards_carry_exactly_the_mistakes_they_are_said_to(tmp_path):
    paths = write_demo_shards(tmp_path)
    members = [dict(tar_members(path)) for path in paths[:3]]
    records = [json.loads(data) for shard in members for name, data in shard.items() if name.endswith(".json")]
    assert len(records) == 3 * 256
    mismatched = sum(not record["matched"] for record in records)
    assert abs(mismatched / len(records) - 0.30) < 0.01
    assert [path.read_bytes() for path in write_demo_shards(tmp_path / "again")] == [p.read_bytes() for p in paths]
