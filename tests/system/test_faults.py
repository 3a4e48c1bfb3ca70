"""What a machine does to a run: a full disk, a read-only one, a shard that goes, a clock that jumps."""

import contextlib
import io
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from clipfilter_wds.cli import main
from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.offline.tally import Tally
from tests.support.outputs import bits, check_accounting
from tests.support.toys import pair, write_shard

OPTIONS = {"threshold": -1.0, "batch_size": 8, "num_workers": 0}


@pytest.fixture
def shards(tmp_path) -> str:
    for shard in range(4):
        write_shard(tmp_path / "in" / f"{shard}.tar", [pair(100 * shard + i, size=(300, 300)) for i in range(20)])
    return f"{tmp_path}/in/*.tar"


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int):
    """A file system of its own, of a fixed size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this takes the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def rewrite(clip_folder: Path, shards: str, output: Path) -> tuple[int, str]:
    """Run the command; its exit code and what it said."""
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
        pytest.raises(SystemExit) as ended,
    ):
        main(["rewrite", shards, "--output", str(output), "--model", str(clip_folder), "--device", "cpu", *options])
    return ended.value.code, said.getvalue()


def test_a_full_disk_is_told_with_its_file_and_the_run_resumes_when_there_is_room(
    scorer, clip_folder, shards, tmp_path
):
    process_shards(RewriteConfig(shards=shards, output=tmp_path / "whole", **OPTIONS), scorer)
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.tar"))
    with small_disk(tmp_path / "disk", num_bytes * 5 // 8):
        output = tmp_path / "disk" / "out"
        code, said = rewrite(clip_folder, shards, output)
        assert code == 1
        assert "No space left on device: '" + str(output) in said
        assert "What was finished is whole; start the same command again to resume" in said
        assert "Traceback" not in said
        # Nothing half-written, under whatever name: what is there is what a whole run writes.
        expected = bits(tmp_path / "whole")
        found = bits(output)
        assert 0 < len(found) < len(expected)
        assert found.items() <= expected.items()
        assert not (output / "summary.json").exists()
        subprocess.run(["mount", "-o", f"remount,size={num_bytes * 2}", str(tmp_path / "disk")], check=True)
        code, said = rewrite(clip_folder, shards, output)
        assert code == 0, said
        assert bits(output) == expected
        assert check_accounting(output)["resumed_shards"] > 0


def test_a_read_only_output_is_an_error_before_anything_is_done(clip_folder, shards, tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        code, said = rewrite(clip_folder, shards, tmp_path / "disk")
        assert code == 2
        assert f"can't write to output '{tmp_path}/disk': Read-only file system" in said


def test_a_shard_that_goes_between_listing_and_reading_fails_alone(scorer, shards, tmp_path):
    config = RewriteConfig(shards=shards, output=tmp_path / "out", **OPTIONS)
    assert len(config.urls) == 4
    (tmp_path / "in" / "2.tar").unlink()
    tally = process_shards(config, scorer)
    assert tally.failed == {str(tmp_path / "in" / "2.tar"): "can't open it: there is no such file"}
    assert (tally.done, check_accounting(tmp_path / "out")["seen"]) == (3, 60)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["0.tar", "1.tar", "3.tar"]


def test_a_shard_that_goes_between_scoring_and_copying_leaves_nothing_of_it(scorer, shards, tmp_path):
    config = RewriteConfig(shards=shards, output=tmp_path / "out", **OPTIONS)

    def remove_the_shard(tally: Tally) -> None:
        if tally.num_scored:  # it is open, and will be opened once more
            (tmp_path / "in" / "0.tar").unlink(missing_ok=True)

    tally = process_shards(config, scorer, on_progress=remove_the_shard)
    assert list(tally.failed) == [str(tmp_path / "in" / "0.tar")]
    assert not list((tmp_path / "out").glob("0.tar*"))
    assert not (tmp_path / "out" / "0_stats.json").exists()


@pytest.mark.parametrize("jump", [-3e8, 3e8], ids=["back", "forth"])
def test_a_clock_that_jumps_changes_nothing(scorer, shards, tmp_path, monkeypatch, jump):
    process_shards(RewriteConfig(shards=shards, output=tmp_path / "usual", **OPTIONS), scorer)
    real, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return real() + jump * (calls % 2)

    monkeypatch.setattr(time, "time", jumping)
    began = time.perf_counter()
    process_shards(RewriteConfig(shards=shards, output=tmp_path / "out", **OPTIONS), scorer)
    took = time.perf_counter() - began
    assert bits(tmp_path / "out") == bits(tmp_path / "usual")
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert 0 < summary["seconds"] <= took
    assert summary["samples_per_second"] >= summary["scored"] / took
