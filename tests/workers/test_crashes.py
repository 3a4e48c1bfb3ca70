"""Decoders that really end their process, or never end: the sample is named, tried again, and left out."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image, PpmImagePlugin

from clipfilter_wds.cli import main
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.tables.config import TableConfig
from clipfilter_wds.tables.run import process_table
from clipfilter_wds.tables.tally import PairTally
from clipfilter_wds.types import DropReason
from clipfilter_wds.workers.crashes import WorkerDiedError
from tests.support.evil import EVIL, EvilImageFile, leave, loop_in_c, out_of_memory, segfault, write_shards
from tests.support.outputs import bits, check_accounting
from tests.support.toys import encoded, photo, write_shard

DEATHS = {segfault: "SIGSEGV", out_of_memory: "SIGKILL", leave: "exit code 0", loop_in_c: "longer than worker_timeout"}

each_harm = pytest.mark.parametrize(
    "harm",
    [segfault, loop_in_c, *(pytest.param(harm, marks=pytest.mark.slow) for harm in (out_of_memory, leave))],
    ids=lambda harm: harm.__name__,
)


@pytest.fixture
def evil(monkeypatch, tmp_path):
    """Let the workers, which are forked, decode PPM with the plug-in; it notes each try in a file."""
    Image.preinit()
    Image.init()
    monkeypatch.setattr(EvilImageFile, "tries", tmp_path / "tries", raising=False)
    monkeypatch.setitem(Image.OPEN, "PPM", (EvilImageFile, PpmImagePlugin._accept))
    return EvilImageFile


def reasons(table: Path) -> dict[int, str]:
    found = ShardScores.read(table).table["reason"].to_pylist()
    return {number: reason for number, reason in enumerate(found) if reason}


# --- rewrite and score ---


@each_harm
def test_rewrite_continues_without_a_sample_that_kills_its_process_twice(
    scorer, evil, monkeypatch, tmp_path, caplog, harm
):
    monkeypatch.setattr(evil, "harm", staticmethod(harm))
    write_shards(tmp_path / "in", {1: {7}})
    shard = tmp_path / "in" / "1.tar"
    data = shard.read_bytes()
    options = {"shards": f"{tmp_path}/in/*.tar", "threshold": 0.0, "batch_size": 4}
    # First with that sample unreadable, so that it kills nobody.
    shard.write_bytes(data.replace(b"P6 # evil 7", b"no # image "))
    began = time.monotonic()
    process_shards(RewriteConfig(**options, output=tmp_path / "plain", num_workers=0), scorer)
    timeout = max(0.5, time.monotonic() - began)  # of one sample; all of them took no longer, on a busy machine too
    shard.write_bytes(data)

    config = RewriteConfig(**options, output=tmp_path / "out", num_workers=2, worker_timeout=timeout)
    tally = process_shards(config, scorer)
    assert (tally.counts.seen, tally.counts.dropped) == (60, {DropReason.DECODER_CRASH: 1})
    assert not tally.failed
    assert reasons(tmp_path / "out" / "_scores" / "1.parquet") == {7: "decoder_crash"}
    assert (tmp_path / "tries").read_text() == "xx"
    check_accounting(tmp_path / "out")
    first, second = [record.getMessage() for record in caplog.records if "died" in record.getMessage()]
    assert DEATHS[harm] in first
    assert f"at sample 7 of '{tmp_path}/in/1.tar'" in first
    assert first.endswith("trying once more")
    assert second.endswith("that is left out")

    # All else has the bits that it has without.
    there, here = bits(tmp_path / "plain"), bits(tmp_path / "out")
    assert there.keys() == here.keys()
    assert {name for name in here if here[name] != there[name]} <= {"1_stats.json", "_scores/1.parquet"}
    assert here["1.tar"] == there["1.tar"]


@pytest.mark.slow
def test_several_evil_samples_in_shards_that_workers_share_are_each_left_out(scorer, evil, tmp_path):
    left_out = {0: {0, 13}, 1: {19}}
    write_shards(tmp_path / "in", left_out, num_shards=2)
    for batch_size, num_workers in ((3, 3), (64, 1)):
        output = tmp_path / f"out{num_workers}"
        config = ScoreConfig(
            shards=f"{tmp_path}/in/*.tar", output=output, batch_size=batch_size, num_workers=num_workers
        )
        tally = process_shards(config, scorer)
        assert tally.counts.dropped == {DropReason.DECODER_CRASH: 3}
        for shard, numbers in left_out.items():
            assert reasons(output / f"{shard}.parquet") == dict.fromkeys(numbers, "decoder_crash")


def test_a_decoder_that_kills_once_costs_no_sample(scorer, evil, monkeypatch, tmp_path, caplog):
    def only_first() -> None:
        if (tmp_path / "tries").read_text() == "x":
            out_of_memory()

    monkeypatch.setattr(evil, "harm", staticmethod(only_first))
    write_shards(tmp_path / "in", {1: {7}})
    config = ScoreConfig(shards=f"{tmp_path}/in/*.tar", output=tmp_path / "out", num_workers=2, batch_size=4)
    tally = process_shards(config, scorer)
    assert (tally.counts.seen, tally.counts.kept) == (60, 60)
    assert "trying once more" in caplog.text


@pytest.mark.slow
def test_when_every_sample_kills_the_run_ends_with_an_error_that_names_one(scorer, evil, tmp_path):
    write_shards(tmp_path / "in", {0: set(range(20))}, num_shards=1)
    config = ScoreConfig(shards=f"{tmp_path}/in/*.tar", output=tmp_path / "out", num_workers=1, batch_size=64)
    with pytest.raises(WorkerDiedError, match=r"SIGSEGV\) at sample 16 of "):
        process_shards(config, scorer)


def test_a_shard_whose_reading_kills_fails_alone(scorer, evil, monkeypatch, tmp_path):
    from clipfilter_wds.shards import samples

    really = samples.open_shard

    def open_shard(url: str, **options):
        if url.endswith("1.tar"):
            segfault()
        return really(url, **options)

    monkeypatch.setattr(samples, "open_shard", open_shard)
    write_shards(tmp_path / "in", {})
    tally = process_shards(ScoreConfig(shards=f"{tmp_path}/in/*.tar", output=tmp_path / "out", num_workers=1), scorer)
    assert tally.failed == {f"{tmp_path}/in/1.tar": "reading it killed two worker processes"}
    assert tally.counts.kept == 40


def test_a_slow_sample_is_no_crash_without_a_limit(scorer, evil, monkeypatch, tmp_path):
    def num_kept(seconds: float, timeout: float) -> int:
        monkeypatch.setattr(evil, "harm", staticmethod(partial(time.sleep, seconds)))
        output = tmp_path / f"out{timeout}"
        config = ScoreConfig(shards=f"{tmp_path}/in/*.tar", output=output, num_workers=1, worker_timeout=timeout)
        return process_shards(config, scorer).counts.kept

    write_shards(tmp_path / "in", {0: {1}}, num_shards=1, num_samples=3)
    began = time.monotonic()
    assert num_kept(0.5, timeout=0) == 3
    timeout = time.monotonic() - began  # of one sample; all of them took no longer
    assert num_kept(100 * timeout, timeout=timeout) == 2


def test_a_limit_that_no_sample_can_keep_is_named_once(scorer, tmp_path, caplog):
    write_shards(tmp_path / "in", {}, num_shards=1)
    config = ScoreConfig(shards=f"{tmp_path}/in/*.tar", output=tmp_path / "out", num_workers=1, worker_timeout=1e-6)
    with pytest.raises(WorkerDiedError, match=r"nothing of it was decoded, so worker_timeout is too short for any"):
        process_shards(config, scorer)
    assert len([message for message in caplog.messages if "died" in message]) <= 2


def test_an_image_that_kills_among_those_that_measure_low_precision_ends_no_run_and_changes_no_bit(
    clip_folder, evil, monkeypatch, tmp_path
):
    scorer = ClipScorer(clip_folder, device="cpu", precision="bf16")
    write_shards(tmp_path / "in", {0: {2}})
    tables = {}
    for num_workers in (1, 2):
        output = tmp_path / f"out{num_workers}"
        config = RewriteConfig(shards=f"{tmp_path}/in/*.tar", output=output, batch_size=4, num_workers=num_workers)
        tally = process_shards(config, scorer)
        assert (tally.counts.seen, tally.counts.dropped[DropReason.DECODER_CRASH]) == (60, 1)
        tables[num_workers] = [ShardScores.read(output / "_scores" / f"{shard}.parquet") for shard in range(3)]
    # In this process, where it is unreadable and kills nobody.
    shard = tmp_path / "in" / "0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"P6 # evil 2", b"no # image "))
    monkeypatch.undo()
    config = RewriteConfig(shards=f"{tmp_path}/in/*.tar", output=tmp_path / "out0", batch_size=4, num_workers=0)
    process_shards(config, scorer)
    for shard in range(3):
        plain = ShardScores.read(tmp_path / "out0" / "_scores" / f"{shard}.parquet")
        assert plain.metadata.band > 0
        for here in (tables[1][shard], tables[2][shard]):
            assert here.metadata.band == plain.metadata.band
            assert here.table["score"].equals(plain.table["score"])


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_a_timeout_that_is_no_time_is_refused(tmp_path, timeout):
    shard = write_shard(tmp_path / "0.tar", [])
    with pytest.raises(ValueError, match=f"worker_timeout is {timeout:g}; it is a number of seconds"):
        ScoreConfig(shards=shard, output=tmp_path / "out", worker_timeout=timeout)


# --- tables ---


def write_table(folder: Path, evil: set[int], num_rows: int = 30) -> Path:
    """Rows of pairs, some images of which are evil."""
    folder.mkdir()
    for row in range(num_rows):
        image = EVIL % row if row in evil else encoded(photo(row))
        (folder / f"{row}.image").write_bytes(image)
    rows = [{"image": f"{row}.image", "caption": f"photo number {row}"} for row in range(num_rows)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def filter_table(table: Path, scorer: ClipScorer, **options: object) -> tuple[PairTally, list[tuple[str, float]]]:
    """How the rows fared, and the image and score of those that were written; by default, all."""
    output = table.with_name("kept.jsonl")
    options = {"threshold": 0.0, "score_key": "score", "batch_size": 4, "num_workers": 2, **options}
    tally = process_table(TableConfig(input=table, output=output, **options), lambda: scorer)
    return tally, [(row["image"], row["score"]) for row in map(json.loads, output.read_text().splitlines())]


@each_harm
def test_a_row_of_a_table_whose_image_kills_twice_scores_as_an_unreadable_one(
    scorer, evil, monkeypatch, tmp_path, caplog, harm
):
    monkeypatch.setattr(evil, "harm", staticmethod(harm))
    table = write_table(tmp_path / "in", {7})
    image = table.parent / "7.image"
    data = image.read_bytes()
    # First with that image unreadable, so that it kills nobody.
    image.write_bytes(b"no image")
    began = time.monotonic()
    plain, expected = filter_table(table, scorer, num_workers=0)
    timeout = max(0.5, time.monotonic() - began)  # of one row; all of them took no longer, on a busy machine too
    assert plain.unusable == {DropReason.UNREADABLE_IMAGE: 1}
    image.write_bytes(data)

    tally, rows = filter_table(table, scorer, worker_timeout=timeout)
    assert (tally.counts.seen, tally.counts.kept) == (30, 30)
    assert tally.unusable == {DropReason.DECODER_CRASH: 1}
    assert tally.first == {DropReason.DECODER_CRASH: (7, "7.image")}
    assert (tmp_path / "tries").read_text() == "xx"
    first, second = [record.getMessage() for record in caplog.records if "died" in record.getMessage()]
    assert DEATHS[harm] in first
    assert f"at sample 7 of '{table}'" in first
    assert first.endswith("trying once more")
    assert second.endswith("that is left out")
    assert rows == expected
    assert rows[7] == ("7.image", 0.0)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(3, 2), pytest.param(64, 1, marks=pytest.mark.slow)], ids=str)
def test_rows_that_kill_are_dropped_and_all_others_stay_in_order(scorer, evil, tmp_path, batch_size, num_workers):
    evil_rows = {1, 2, 29}
    table = write_table(tmp_path / "in", evil_rows)
    tally, kept = filter_table(table, scorer, batch_size=batch_size, num_workers=num_workers, threshold=0.1)
    assert tally.counts.dropped[DropReason.DECODER_CRASH] == 3
    for row in evil_rows:
        (table.parent / f"{row}.image").write_bytes(b"no image")
    plain, expected = filter_table(table, scorer, batch_size=batch_size, num_workers=0, threshold=0.1)
    assert plain.counts.dropped[DropReason.BELOW_THRESHOLD] > 0
    assert kept == expected


def test_an_image_that_kills_once_costs_no_row(scorer, evil, monkeypatch, tmp_path):
    def only_first() -> None:
        if (tmp_path / "tries").read_text() == "x":
            out_of_memory()

    monkeypatch.setattr(evil, "harm", staticmethod(only_first))
    tally, rows = filter_table(write_table(tmp_path / "in", {7}), scorer)
    assert not tally.unusable
    assert [image for image, _ in rows] == [f"{row}.image" for row in range(30)]


@pytest.mark.slow
def test_when_every_image_of_a_table_kills_the_command_fails_in_a_line_and_writes_nothing(
    clip_folder, evil, tmp_path, capsys
):
    table = write_table(tmp_path / "in", set(range(30)))
    with pytest.raises(SystemExit) as raised:
        main(["table", str(table), "--output", str(tmp_path / "kept.jsonl"), "--model", str(clip_folder)])
    assert raised.value.code == 1
    assert f"clipfilter-wds: a worker process died (SIGSEGV) at sample 16 of '{table}'." in capsys.readouterr().err
    assert not list(tmp_path.glob("*kept*"))


def test_a_tables_timeout_that_is_no_time_is_refused(tmp_path):
    table = write_table(tmp_path / "in", set(), num_rows=1)
    with pytest.raises(ValueError, match="worker_timeout is -1; it is a number of seconds"):
        TableConfig(input=table, output=tmp_path / "kept.jsonl", worker_timeout=-1)
