"""The GPU benchmark runs on a CPU with next to no samples, gives every figure, and does only what is missing."""

import json

import pytest

from benchmarks.gpu.record import FAILED, Record
from benchmarks.gpu.run import PARTS
from benchmarks.gpu.targets import TARGETS, met_targets
from benchmarks.gpu.timing import Timeline
from tests.support.processes import in_fresh_process

ON_CPU = {part.name for part in PARTS if not part.needs_gpu}


def run(folder, *args) -> dict:
    options = ["--device=cpu", "--quick=true", "--num_workers=2", "--budget=1e5", f"--cache={folder}/cache"]
    in_fresh_process(_main, ["gpu", *options, f"--output={folder}", *args], timeout=1500)
    return json.loads((folder / "gpu.json").read_text())


def _main(args: list[str]) -> None:
    from benchmarks.run import main

    main(args)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_part_gives_its_figures_and_a_second_call_those_that_are_missing(tmp_path):
    first = run(tmp_path, '--only=["forward","matmul"]')
    assert {"matmul", "forward vit-b-32", "plain forward vit-l-14"} <= first["parts"].keys() < ON_CPU
    second = run(tmp_path)
    assert second["parts"].keys() == ON_CPU
    assert not {name: part for name, part in second["parts"].items() if FAILED in part}
    assert {name: second["parts"][name] for name in first["parts"]} == first["parts"]
    assert all(part["seconds"] > 0 for part in second["parts"].values())
    assert [row["target"] for row in second["targets"] if row["met"] is None] == []
    decisions = second["parts"]["decisions vit-b-32"]
    assert decisions["other_decisions"] == 0
    assert 0 < decisions["off_float32_of_cpu"] < 1e-5
    assert 0 < decisions["rechecked_share"] < 1
    assert decisions["band"] > 0
    for name in ("rewrite vit-b-32, 256 px", "inline vit-l-14, 256 px", "plain loop vit-b-32, 256 px"):
        assert second["parts"][name]["samples_per_s"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert all(target.name in text for target in TARGETS)
    assert all(f"### {name}" in text for name in ON_CPU)


def test_figures_of_another_machine_are_not_added_to(tmp_path):
    Record(tmp_path, {"gpu": "one"}).save()
    assert Record(tmp_path, {"gpu": "one"}).parts == {}
    with pytest.raises(SystemExit, match="another --output"):
        Record(tmp_path, {"gpu": "other"})


def test_a_part_that_failed_or_was_left_out_is_missing(tmp_path):
    record = Record(tmp_path, {})
    record.parts.update({"a": {"figure": 1}, "b": {FAILED: "why", "figure": 2}})
    record.save()
    again = Record(tmp_path, {})
    assert (again.is_done("a"), again.is_done("b"), again.is_done("c")) == (True, False, False)
    assert (again.figure("a", "figure"), again.figure("b", "figure"), again.figure("c", "figure")) == (1, None, None)


def test_targets_tell_what_is_met_what_is_not_and_what_was_not_measured(tmp_path):
    record = Record(tmp_path, {})
    fast, slow, same = (TARGETS[number] for number in (0, 1, 9))
    record.parts.update({fast.part: {fast.figure: 12_000}, slow.part: {slow.figure: 11_999}})
    record.parts[same.part] = {same.figure: 0}
    met = {row["target"]: row["met"] for row in met_targets(record)}
    assert (met[fast.name], met[slow.name], met[same.name]) == (True, False, True)
    assert None in met.values()


def test_every_target_is_a_figure_of_a_part():
    assert {target.part for target in TARGETS} <= {part.name for part in PARTS}


def test_the_rate_is_that_of_the_middle_of_a_run(monkeypatch):
    now = iter([0.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 30.0])  # slow at first, and at the end
    monkeypatch.setattr("benchmarks.gpu.timing.time.perf_counter", lambda: next(now))
    timeline = Timeline()
    for count in (0, 300, 400, 500, 600, 700, 900, 1000):
        timeline.note(count)
    assert timeline.rate == pytest.approx(600 / 5)
