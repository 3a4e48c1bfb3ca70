import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipfilter_wds.demo.run import demo_threshold
from clipfilter_wds.demo.shards import write_demo_shards
from tests.support.outputs import check_accounting
from tests.support.pace import cpu_seconds_of_children
from tests.support.toys import tar_members


def test_demo_runs_within_a_minute_and_finds_the_truth(command, tmp_path):
    folder = tmp_path / "a [demo]"
    began = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "clipfilter_wds", "demo", "--output", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert cpu_seconds_of_children() - began < 60
    out = " ".join(done.stdout.split())
    precision, recall = (float(value) for value in re.search(r"precision ([\d.]+), recall ([\d.]+)", out).groups())
    assert precision > 0.95
    assert recall > 0.95

    summary = check_accounting(folder / "filtered")
    assert summary["threshold"] == demo_threshold()
    dropped = {reason: count for reason, count in summary["dropped"].items() if reason != "below_threshold"}
    assert dropped == {"blank_caption": 1, "missing_caption": 1, "unreadable_image": 2, "torn": 1}
    assert f"seen {summary['seen']:,}" in out
    assert Image.open(folder / "overview.png").width > 500
    assert f"would keep: {folder}/report.html\n" in done.stdout
    assert f"as a picture: {folder}/overview.png\n" in done.stdout
    [by_hand] = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("  clipfilter-wds ")]
    code, said = command(*by_hand[1:], "--dry_run")
    assert code == 0
    assert "would read 4 shards" in said


def test_demo_shards_carry_exactly_the_mistakes_they_are_said_to(tmp_path):
    paths = write_demo_shards(tmp_path)
    members = [dict(tar_members(path)) for path in paths[:3]]
    records = [json.loads(data) for shard in members for name, data in shard.items() if name.endswith(".json")]
    assert len(records) == 3 * 256
    mismatched = sum(not record["matched"] for record in records)
    assert abs(mismatched / len(records) - 0.30) < 0.01
    assert [path.read_bytes() for path in write_demo_shards(tmp_path / "again")] == [p.read_bytes() for p in paths]


def demo(command, folder) -> tuple[int, str]:
    return command("demo", "--output", folder)


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    ["shards/00000.tar", "shards/mine.tar", "shards/notes.txt", "filtered/00000.tar", "report.html", "overview.png"],
)
def test_files_that_the_demo_did_not_write_are_never_replaced_nor_mixed_with(command, tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<html>mine")
    code, said = demo(command, tmp_path / "mine")
    assert code == 2
    shown = name if name.startswith("shards") else name.partition("/")[0]
    assert f"holds '{shown}', which this version's demo did not write; choose another folder" in said
    assert files(tmp_path / "mine") == {name: b"<html>mine"}


@pytest.mark.slow
def test_the_demo_runs_again_over_its_own_output_and_over_what_a_killed_one_left(command, tmp_path):
    [first, *_] = write_demo_shards(tmp_path / "all")
    (tmp_path / "out" / "shards").mkdir(parents=True)
    shutil.copy(first, tmp_path / "out" / "shards")
    (tmp_path / "out" / "shards" / f".00001.tar.{'0' * 32}.clipfilter-tmp").write_bytes(b"cut")
    assert demo(command, tmp_path / "out")[0] == 0
    made = files(tmp_path / "out")
    assert {"report.html", "overview.png", "filtered/00000.tar"} <= set(made)
    code, said = demo(command, tmp_path / "out")
    assert code == 0
    assert "nothing was left to do" in said
    assert {name for name, data in files(tmp_path / "out").items() if made[name] != data} <= {
        "report.html",
        "filtered/summary.json",
    }
    mine = io.BytesIO()
    Image.open(tmp_path / "out" / "overview.png").save(
        mine, format="PNG"
    )  # as another program saves it, without the signature
    for name, data, complaint in [
        ("report.html", b"notes of my own", "is no web page"),
        ("overview.png", mine.getvalue(), "holds 'overview.png', which this version's demo did not write"),
        ("overview.png", b"no picture", "holds 'overview.png', which this version's demo did not write"),
    ]:
        (tmp_path / "out" / name).write_bytes(data)
        code, said = demo(command, tmp_path / "out")
        assert code == 2
        assert complaint in said
        assert (tmp_path / "out" / name).read_bytes() == data
        (tmp_path / "out" / name).write_bytes(made[name])


@pytest.mark.parametrize("name", ["", "shards", "filtered"])
def test_an_output_that_can_not_be_written_is_an_argument_that_can_not_be_used(command, tmp_path, name):
    if name == "filtered":
        write_demo_shards(tmp_path / "out" / "shards")
    (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / name).write_bytes(b"a file")
    code, said = demo(command, tmp_path / "out")
    assert code == 2
    assert f"can't write to output '{tmp_path / 'out' / name}': Not a directory" in said
    assert "resume" not in said


def test_an_output_on_other_storage_is_refused_and_no_folder_of_its_name_made(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = demo(command, "memory://bucket/demo")
    assert code == 2
    assert "output 'memory://bucket/demo' is not on this machine, where the demo writes; name a local folder" in said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_looked_into_is_left_alone(command, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    (tmp_path / "out" / "shards").mkdir(parents=True)
    monkeypatch.setattr(Path, "iterdir", refuse)  # the tests may run as root, who may look everywhere
    code, said = demo(command, tmp_path / "out")
    assert code == 2
    assert f"can't see what '{tmp_path / 'out' / 'shards'}' is, which may not be replaced: Permission denied" in said
