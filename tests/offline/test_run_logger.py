"""The log of a run, read back from its files."""

import csv
import logging
import shutil
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event

from clipfilter_wds.offline.run_logger import RunLogger
from clipfilter_wds.offline.tally import ShardStats, Tally
from clipfilter_wds.types import DropReason, FilterStats
from tests.support.outputs import bits, check_accounting, run
from tests.support.toys import pair, write_shard


@pytest.fixture
def shards(tmp_path) -> Path:
    for shard in range(2):
        write_shard(
            tmp_path / "in" / f"{shard}.tar", [*(pair(10 * shard + i) for i in range(9)), {**pair(0), "txt": b" "}]
        )
    return tmp_path / "in"


def csv_points(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as lines:
        return [*csv.DictReader(lines)]


def tensorboard_points(folder: Path) -> list[dict[str, float]]:
    """By step, the value of each tag."""
    steps: dict[int, dict[str, float]] = {}
    for file in folder.glob("events.*"):
        for event in _events(file.read_bytes()):
            steps.setdefault(event.step, {}).update({value.tag: value.simple_value for value in event.summary.value})
    return [steps[step] for step in sorted(steps)]


def _events(records: bytes) -> Iterator[Event]:
    while records:
        (size,) = struct.unpack("<Q", records[:8])
        yield Event.FromString(records[12 : 12 + size])
        records = records[16 + size :]


@pytest.mark.parametrize(("log_to", "points"), [("csv", csv_points), ("tensorboard", tensorboard_points)])
def test_the_last_point_is_the_summary_and_the_output_is_that_of_a_run_without_a_log(
    scorer, shards, tmp_path, log_to, points
):
    run(scorer, f"{shards}/*.tar", tmp_path / "plain")
    output = tmp_path / "out"
    summary = run(scorer, f"{shards}/*.tar", output, log_to=log_to)
    log = output / "_logs" / log_to / "version_0"
    last = {name: float(value) for name, value in points(log)[-1].items()}
    assert (last["seen"], last["kept"], last["shards"]) == (summary["seen"], summary["kept"], 2)
    assert last["dropped/blank_caption"] == 2
    assert last["keep_rate"] == pytest.approx(summary["kept"] / summary["seen"])
    assert last["samples_per_second"] > 0
    settings = yaml.safe_load((log / "hparams.yaml").read_text())
    assert (settings["threshold"], settings["model"]) == (0.12, scorer.model_name)

    again = run(scorer, f"{shards}/*.tar", output, log_to=log_to)  # resumes, and has a log of its own
    assert (again["resumed_shards"], again["seen"]) == (2, 20)
    assert points(log.with_name("version_1"))
    shutil.rmtree(output / "_logs")
    assert bits(output) == bits(tmp_path / "plain")
    check_accounting(output)


def test_packing_and_overwriting_leave_the_log_alone(scorer, shards, tmp_path):
    for options in ({}, {"overwrite": True, "threshold": 0.3}):
        run(scorer, f"{shards}/*.tar", tmp_path / "out", samples_per_shard=4, log_to="csv", **options)
        check = tmp_path / "out" / "_logs" / "csv"
    assert [path.name for path in sorted(check.iterdir())] == ["version_0", "version_1"]
    assert all(csv_points(version) for version in check.iterdir())


def test_secrets_of_urls_are_in_no_log(tmp_path):
    settings = {"shards": ["https://user:word@host/0.tar?sig=1", "1.tar"], "output": tmp_path, "threshold": 0.3}
    with RunLogger("csv", tmp_path, settings) as log:
        log.log(Tally(num_shards=1))
    written = (tmp_path / "_logs" / "csv" / "version_0" / "hparams.yaml").read_text()
    assert "host/0.tar" in written
    assert "word" not in written
    assert "sig" not in written


def test_points_come_now_and_then_with_all_reasons_so_far(tmp_path):
    tally = Tally(num_shards=3)
    with RunLogger("csv", tmp_path, {}) as log:
        for _ in range(100):
            log.on_progress(tally)
        dropped = {DropReason.TORN: 1}
        tally.add(ShardStats(counts=FilterStats(seen=4, kept=3, dropped=dropped), rechecked=2))
        log.log(tally)
    first, last = csv_points(tmp_path / "_logs" / "csv" / "version_0")
    assert (first["seen"], first["dropped/torn"]) == ("0", "")
    assert (last["seen"], last["dropped/torn"], last["rechecked_share"]) == ("4", "1", "0.5")


def test_a_logger_that_fails_later_costs_a_warning(tmp_path, caplog):
    with RunLogger("csv", tmp_path, {}) as log:
        log.log(Tally(num_shards=1))
        shutil.rmtree(tmp_path / "_logs")
        (tmp_path / "_logs").write_text("in the way")
        with caplog.at_level(logging.WARNING):
            log.log(Tally(num_shards=1))
            log.log(Tally(num_shards=1))
    [record] = caplog.records
    assert record.getMessage().startswith("the run goes on without its log: ")


@pytest.mark.parametrize("log_to", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_named(command, shards, tmp_path, log_to):
    if find_spec(log_to):
        pytest.skip(f"{log_to} is installed here")
    code, said = command(
        "score", shards, "--output", tmp_path / "out", "--model", "demo-tiny", "--log_to", log_to, "--num_workers", 0
    )
    assert code == 2
    assert f"log_to {log_to} needs a package that is not installed: pip install {log_to}" in said


def test_a_log_that_cannot_begin_is_refused_before_the_model_is_loaded(command, shards, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_logs").write_text("in the way")
    code, said = command("score", shards, "--output", tmp_path / "out", "--model", "demo-tiny", "--log_to", "csv")
    assert code == 2
    assert "can't log to csv: " in said
    assert "leave out log_to" in said
