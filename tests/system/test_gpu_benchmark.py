"""The GPU benchmark runs on a CPU with next to no samples, gives every figure, and does only what is missing."""

import io
import json
import time
from contextlib import redirect_stdout

import pytest

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import FAILED, LEFT_OUT, Record
from benchmarks.gpu.run import PARTS, Part, gpu, time_limit
from benchmarks.gpu.scale import QUICK
from benchmarks.gpu.targets import TARGETS, met_targets
from benchmarks.gpu.timing import Timeline
from benchmarks.options import Options
from benchmarks.report import Report
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
    parts = {target.part for target in TARGETS} | {target.of[0] for target in TARGETS if target.of}
    assert parts <= {part.name for part in PARTS}


def test_a_share_is_known_once_both_figures_are_in_whatever_order(tmp_path):
    record = Record(tmp_path, {})
    shares = [target for target in TARGETS if target.of is not None]
    assert len(shares) == 5
    for first, second in ((0, 1), (1, 0)):
        for target in shares:
            figures = [(target.part, {target.figure: 30.0}), (target.of[0], {target.of[1]: 40.0})]
            record.parts.clear()
            record.parts.update([figures[first]])
            assert target.found_in(record) is None
            record.parts.update([figures[second]])
            assert target.found_in(record) == 0.75


def _hang(_bench):
    time.sleep(600)


def _raise(_bench):
    raise RuntimeError("out of luck")


def run_parts(folder) -> str:
    """What is printed of parts that hang, raise, take too long for what is left, and work."""
    hangs, raises, works = Part("hangs", 0.05, _hang), Part("raises", 9, _raise), Part("works", 9, lambda _: {"one": 1})
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setattr("benchmarks.gpu.run.PARTS", (hangs, raises, Part("late", 1e4, _hang), works))
        options = Options(device="cpu", quick=True, budget=9e3, num_workers=3, output=folder, cache=folder / "cache")
        gpu(options, Report(folder, {}))
    return output.getvalue()


def test_a_part_that_hangs_or_raises_is_told_of_and_the_next_one_runs(tmp_path):
    printed = in_fresh_process(run_parts, tmp_path)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["hangs"][FAILED] == "TimeoutError: it took longer than 0.2 s"
    assert parts["raises"][FAILED] == "RuntimeError: out of luck"
    assert "_raise" in parts["raises"]["traceback"]
    assert LEFT_OUT in parts["late"]
    assert parts["works"]["one"] == 1
    assert all(f"{name}: " in printed for name in parts)


def test_after_a_time_limit_nothing_else_is_ended():
    with pytest.raises(TimeoutError, match="longer than"), time_limit(0.01):
        time.sleep(600)
    with time_limit(0.01):
        pass
    time.sleep(0.1)


def test_every_worker_has_as_many_shards(tmp_path):
    options = Options(device="cpu", quick=True, num_workers=4, cache=tmp_path)
    with Bench(options, QUICK, Record(tmp_path, {})) as bench:
        assert [len(bench.shards(size).shards) for size in (256, 512)] == [8, 4]
        assert [len(bench.shards(size, 1 / 4).shards) for size in (256, 512)] == [4, 4]


def noted(monkeypatch, notes) -> Timeline:
    """A run of which this is known: when how many samples were done."""
    times = iter([seconds for seconds, _ in notes])
    timeline = Timeline()
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.gpu.timing.time.perf_counter", lambda: next(times))
        for _, count in notes:
            timeline.note(count)
    return timeline


def test_the_rate_of_workers_whose_batches_come_all_at_once_is_that_of_their_turns(monkeypatch):
    """Four workers take ten seconds for a batch of a hundred samples, and the first ones longer."""
    times = [first + worker / 10 for first in (15, 25, 35) for worker in range(4)]
    times.append(45.0)  # and then it was stopped
    timeline = noted(monkeypatch, [(seconds, 100 * number) for number, seconds in enumerate(times, 1)])
    assert timeline.rate_of_turns(4) == pytest.approx(400 / 10)


def test_the_rate_is_that_of_the_middle_of_a_run(monkeypatch):
    slow_at_both_ends = [(0.0, 0), *((20 + count / 100, count) for count in range(100, 901, 10)), (60.0, 1000)]
    assert noted(monkeypatch, slow_at_both_ends).rate_of_rounds(50) == pytest.approx(100)
    assert noted(monkeypatch, [(0.0, 10), (4.0, 30)]).rate_of_rounds(50) == pytest.approx(5)


def test_what_was_decoded_ahead_before_anything_was_scored_does_not_count(monkeypatch):
    ahead = [(0.0, 0), *((10 + count / 1000, count) for count in range(10, 251, 10))]
    then = [(10.25 + (count - 250) / 100, count) for count in range(260, 1001, 10)]
    assert noted(monkeypatch, [*ahead, *then]).rate_of_rounds(125) == pytest.approx(100)


@pytest.mark.parametrize("num_rounds", [8, 9, 10, 11])
@pytest.mark.parametrize("note_every", [64, 107])
def test_so_is_that_of_workers_that_are_done_together(monkeypatch, num_rounds, note_every):
    """Eight workers take ten seconds for a batch of 64, and the scorer takes one second for all of these."""
    done = [(10 * (count // 512 + 1) + (count % 512) / 512, count + 1) for count in range(512 * num_rounds)]
    timeline = noted(monkeypatch, [note for note in done if note[1] % note_every == 0])
    assert timeline.rate_of_rounds(512) == pytest.approx(51.2, rel=0.04)
