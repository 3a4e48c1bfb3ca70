import base64
import io
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from PIL import Image

from clipfilter_wds.cli import main
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.pictures import MAX_THUMBNAIL_BYTES
from clipfilter_wds.report.run import write_report
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import DropReason
from tests.report.conftest import THRESHOLD, Run, page_data
from tests.support.score_tables import derive, written
from tests.support.toys import encoded, pair, photo, write_shard


def report(run: Run, tmp_path, **options) -> dict:
    write_report(ReportConfig(scores=run.output, output=tmp_path / "r.html", **options))
    return page_data(tmp_path / "r.html")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_the_page_closes_the_accounting(run):
    data, summary = page_data(run.report), json.loads((run.output / "summary.json").read_bytes())
    assert data["seen"] == summary["seen"]
    assert data["kept"] == summary["kept"]
    unusable = {reason: count for reason, count in summary["dropped"].items() if reason != "below_threshold"}
    assert data["unusable"] == unusable
    assert max(data["at_least"]) == summary["seen"] - sum(unusable.values())
    assert sum(data["tokens"]["counts"]) == max(data["at_least"])
    assert data["tokens"]["truncated"] == summary["truncated_captions"] > 0
    assert sum(point["kept"] for point in data["shards"]["points"]) == summary["kept"]


def test_the_page_names_model_fingerprint_and_precision(run):
    page, table = run.report.read_text(), run.tables[0]
    for name in ("model", "weights", "tokenizer", "precision"):
        assert str(table.metadata.fingerprint[name]) in page
    assert re.search(r'<th scope="row">band</th><td>[\d.]+</td>', page)


def test_commands_write_the_same_report(run, clip_folder, tmp_path, capsys):
    options = ("--model", clip_folder, "--threshold", THRESHOLD, "--batch_size", 40, "--num_workers", 0)
    shards = f"{run.shards}/*.tar"
    assert call("rewrite", shards, "--output", tmp_path / "out", *options, "--report", tmp_path / "a.html") == 0
    assert call("report", tmp_path / "out", "--shards", shards, "--output", tmp_path / "b.html") == 0
    assert page_data(tmp_path / "a.html") == page_data(tmp_path / "b.html")
    assert page_data(tmp_path / "a.html")["kept"] == run.kept(THRESHOLD)


def test_a_run_that_only_scored_is_shown_at_the_default_threshold(run, scorer, tmp_path):
    process_shards(ScoreConfig(shards=f"{run.shards}/*.tar", output=tmp_path / "scores", num_workers=0), scorer)
    write_report(ReportConfig(scores=tmp_path / "scores", output=tmp_path / "r.html"))
    assert page_data(tmp_path / "r.html")["threshold"] == 0.25
    assert page_data(tmp_path / "r.html")["kept"] == run.kept(0.25)


def reported(run: Run, folder, fraction: float, **options) -> tuple[dict, dict, str]:
    """A rewrite that keeps a fraction: its summary, and its page's data and text."""
    config = RewriteConfig(
        shards=f"{run.shards}/*.tar", output=folder / "out", scores=run.output / "_scores", keep_fraction=fraction,
        **options,
    )  # fmt: skip
    process_shards(config)
    write_report(ReportConfig(scores=config.scores, run=config.output, output=folder / "r.html"))
    summary = json.loads((folder / "out" / "summary.json").read_bytes())
    return summary, page_data(folder / "r.html"), " ".join((folder / "r.html").read_text().split())


def check_page_of_a_fraction(run: Run, folder, fraction: float) -> tuple[dict, str]:
    summary, data, text = reported(run, folder, fraction)
    scores = run.all_scores()
    assert summary["kept"] == data["kept"] == round(fraction * len(scores))
    assert sum(point["kept"] for point in data["shards"]["points"]) == summary["kept"]
    num_scored = data["seen"] - sum(data["unusable"].values())
    assert num_scored - data["kept"] == summary["dropped"].get("below_threshold", 0)
    lowest = float(scores[len(scores) - summary["kept"]]) if summary["kept"] else None
    assert summary["cut"] == data["cut"] == lowest
    assert data["threshold"] == (1.0 if lowest is None else lowest)
    return summary, text


@settings(max_examples=6)
@given(st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]))
def test_the_page_of_a_fraction_starts_at_the_cut_and_counts_as_the_run_did(run, tmp_path_factory, fraction):
    summary, text = check_page_of_a_fraction(run, tmp_path_factory.mktemp("fraction"), fraction)
    assert f"{summary['kept']} samples" in text
    assert "exactly this score" not in text  # no two scores are equal
    assert summary["cut_ties_dropped"] == 0


@settings(max_examples=6)
@given(st.integers(0, 200))
def test_where_the_fraction_ends_among_equal_scores_the_page_says_how_many_were_dropped(
    equal_scores, tmp_path_factory, num_kept
):
    num_scores = len(equal_scores.all_scores())
    fraction = min(num_kept, num_scores) / num_scores
    summary, text = check_page_of_a_fraction(equal_scores, tmp_path_factory.mktemp("ties"), fraction)
    scores = equal_scores.all_scores()
    num_reached = int((scores >= summary["cut"]).sum()) if summary["kept"] else 0
    assert summary["cut_ties_dropped"] == num_reached - summary["kept"]
    assert ("exactly this score" in text) == (num_reached > summary["kept"])


@pytest.fixture(scope="module")
def equal_scores(scorer, tmp_path_factory) -> Run:
    """Shards of a few pairs, again and again."""
    folder = tmp_path_factory.mktemp("equal")
    for shard in range(3):
        write_shard(folder / "shards" / f"{shard}.tar", [pair(index % 5) for index in range(30)])
    config = ScoreConfig(shards=f"{folder}/shards/*.tar", output=folder / "out" / "_scores", num_workers=0)
    process_shards(config, scorer)
    return Run(output=folder / "out", shards=folder / "shards", report=folder / "r.html")


def test_the_cut_is_in_the_closing_summary_and_is_a_threshold_that_keeps_the_same(run, tmp_path, capsys):
    shards, scores = f"{run.shards}/*.tar", run.output / "_scores"
    options = ("--keep_fraction", 0.3, "--report", tmp_path / "r.html")
    assert call("rewrite", shards, "--output", tmp_path / "out", "--scores", scores, *options) == 0
    shown = re.search(r"cut: scores of at least ([\d.e-]+) are kept", capsys.readouterr().out)[1]
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert float(shown) == summary["cut"] == page_data(tmp_path / "r.html")["threshold"]
    assert call("rewrite", shards, "--output", tmp_path / "same", "--scores", scores, "--threshold", shown) == 0
    assert json.loads((tmp_path / "same" / "summary.json").read_bytes())["kept"] == summary["kept"]


def test_without_shards_the_gallery_has_scores_only(run, tmp_path):
    cards = report(run, tmp_path)["cards"]
    assert len(cards) == 120
    assert all(card["image"] is None and card["caption"] is None for card in cards)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "found none of 8 scored shards in {}: the report has no pictures\n"),
        (
            ["00003.tar"],
            "found 1 of 8 scored shards in {}: the report has no pictures of the others\n",
        ),
        ([f"{number:05d}.tar" for number in range(8)], ""),
    ],
)
def test_the_terminal_says_how_many_scored_shards_are_found(run, command, tmp_path, names, said):
    write_shard(tmp_path / "s" / "other.tar", [pair(0)])
    for name in names:
        shutil.copy(run.shards / name, tmp_path / "s")
    page = tmp_path / "r.html"
    arguments = ("report", run.output, "--shards", tmp_path / "s", "-o", page)
    assert command(*arguments) == (0, said.format(tmp_path / "s") + f"the report is {page}\n")
    assert command(*arguments, "--quiet") == (0, "")
    num_lacking = sum(card["problem"] == "its shard is not among those given" for card in page_data(page)["cards"])
    assert (num_lacking > 0) == bool(said)


def test_shards_may_be_named_one_by_one(run, command, tmp_path):
    named = [word for path in sorted(run.shards.iterdir()) for word in ("--shards", path)]
    code, said = command("report", run.output, *named[:4], "-o", tmp_path / "r.html")
    assert code == 0
    assert said.startswith("found 2 of 8 scored shards in the 2 that are named: ")
    assert command("report", run.output, *named, "-o", tmp_path / "r.html")[1].startswith("the report is ")


def test_shards_are_found_where_they_are_now(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run.shards, moved)
    (moved / "00000.tar").unlink()
    num_bytes = {path.name: path.stat().st_size for path in moved.iterdir()}
    write_shard(moved / "00001.tar", [pair(index, size=(8, 8)) for index in range(40)], start=1000)
    (moved / "00002.tar").write_bytes(b"this is no tar at all, but it is long enough to be looked at" * 20)
    for name in ("00001.tar", "00002.tar"):
        assert (moved / name).stat().st_size < num_bytes[name]
        os.truncate(moved / name, num_bytes[name])
    write_shard(moved / "00003.tar", [pair(index) for index in range(39, -1, -1)])
    cards = report(run, tmp_path, shards=f"{moved}/*.tar", thumbnails=200)["cards"]
    problems = {card["shard"]: card["problem"] for card in cards}
    assert "not among those given" in problems["00000"]
    assert "no such sample" in problems["00001"]
    assert "can't be read" in problems["00002"]
    assert "not the one that was scored" in problems["00003"]
    assert all((card["image"] is None) == (card["shard"] in sorted(problems)[:4]) for card in cards)


def test_pictures_and_captions_are_those_of_the_samples(run):
    cards = [card for card in page_data(run.report)["cards"] if card["image"]]
    assert len(cards) == 200
    for card in cards:
        index = int(card["key"])
        assert (
            f"photo number {100 * int(card['shard']) + index}" in card["caption"] or index % 4 == 0 or index % 10 == 1
        )
        assert (card["width"], card["height"]) == (60 + index, 50)
        encoded_image = base64.b64decode(card["image"].removeprefix("data:image/jpeg;base64,"))
        expected = photo(100 * int(card["shard"]) + index, (60 + index, 50))
        difference = np.asarray(Image.open(io.BytesIO(encoded_image)), float) - np.asarray(expected, float)
        assert np.abs(difference).mean() < 6


def test_two_hundred_pictures_of_the_worst_kind_make_a_page_of_less_than_8_mb(scorer, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (240, 240, 3), dtype=np.uint8)
    jpeg = encoded(Image.fromarray(noise), quality=95)
    captions = ("\x1b\u2028<🤷" * 2000).encode()
    write_shard(tmp_path / "in/0.tar", [{"jpg": jpeg, "txt": str(index).encode() + captions} for index in range(200)])
    process_shards(RewriteConfig(shards=tmp_path / "in/0.tar", output=tmp_path / "out", num_workers=0), scorer)
    config = ReportConfig(
        scores=tmp_path / "out", shards=tmp_path / "in/0.tar", output=tmp_path / "r.html", thumbnails=200, threshold=0
    )
    write_report(config)
    assert sum(card["image"] is not None for card in page_data(tmp_path / "r.html")["cards"]) == 200
    assert (tmp_path / "r.html").stat().st_size < 8e6


@pytest.fixture(scope="module")
def million_scores(run, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """Tables of 10^6 samples, and their scores."""
    folder, template, rng = tmp_path_factory.mktemp("million"), run.tables[0], np.random.default_rng(0)
    scores = np.clip(rng.normal(0.24, 0.06, (50, 20_000)), -1, 1).astype(np.float32)
    rows = rng.choice(np.flatnonzero(template.usable), scores.shape[1])
    table = template.table.take(rows).set_column(1, "index", pa.array(np.arange(len(rows), dtype=np.int32)))
    for number, column in enumerate(scores):
        made = table.set_column(table.schema.get_field_index("score"), "score", pa.array(column))
        metadata = replace(template.metadata, shard=f"/data/{number:05d}.tar", num_samples=len(rows))
        (folder / f"{number:05d}.parquet").write_bytes(written(ShardScores(table=made, metadata=metadata)))
    return folder, scores


def test_a_page_of_a_million_samples_is_small_and_exact(million_scores, tmp_path):
    folder, scores = million_scores
    write_report(ReportConfig(scores=folder, output=tmp_path / "r.html", thumbnails=24))
    size, data = (tmp_path / "r.html").stat().st_size, page_data(tmp_path / "r.html")
    assert (data["seen"], len(data["cards"])) == (10**6, 24)
    assert size < 0.5e6
    assert size + 24 * MAX_THUMBNAIL_BYTES * 4 / 3 < 1.5e6  # had all cards the largest picture that there can be
    for threshold in np.linspace(0.01, 0.5, 20).round(4):
        step = round(threshold * data["steps"]) - data["first_step"]
        assert data["at_least"][step] == (scores.astype(np.float64) >= threshold).sum()


def test_samples_that_could_not_be_scored_are_shown_by_reason(run):
    data = page_data(run.report)
    reasons = Counter(card["reason"] for card in data["unusable_cards"])
    assert reasons == {reason: min(number, 6) for reason, number in data["unusable"].items()}
    assert all(card["reason"] is None for card in data["cards"])
    for card in data["unusable_cards"]:
        has_picture = card["reason"] == DropReason.BLANK_CAPTION
        assert (card["image"] is not None) == has_picture
        assert (card["problem"] is None) == has_picture


def test_tables_of_different_settings_are_refused(run, scorer, tmp_path):
    write_shard(tmp_path / "in/a.tar", [{"jpg": pair(0)["jpg"], "json": b'{"caption": "a photo"}'}])
    process_shards(
        ScoreConfig(shards=tmp_path / "in/a.tar", output=tmp_path / "s", caption="json:caption", num_workers=0), scorer
    )
    shutil.copy(run.output / "_scores" / "00000.parquet", tmp_path / "s")
    with pytest.raises(ValueError, match="caption json:caption there, txt here"):
        write_report(ReportConfig(scores=tmp_path / "s", output=tmp_path / "r.html"))


@pytest.mark.parametrize("threshold", [None, -7.5])
@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_scores_of_another_kind_are_counted_over_their_own_range(run, tmp_path, threshold, scale):
    folder = shutil.copytree(run.output / "_scores", tmp_path / "scores")
    derive(folder, "loss", lambda cosines: np.float32(scale) * (cosines - np.float32(0.5)), limits=(None, 0.0))
    write_report(ReportConfig(scores=folder, output=tmp_path / "r.html", threshold=threshold))
    data, page = page_data(tmp_path / "r.html"), (tmp_path / "r.html").read_text()
    tables = [ShardScores.read(path) for path in sorted(folder.glob("*.parquet"))]
    scores = np.concatenate([table.scores[table.usable] for table in tables]).astype(np.float64)
    assert (data["kind"], data["is_cosine"]) == ("loss", False)
    assert "as <strong>loss</strong>" in page
    assert "clipped to [0, 1]" not in page
    if threshold is None:
        assert data["threshold"] == np.sort(scores)[len(scores) - round(len(scores) / 2)]
    else:
        assert data["threshold"] == threshold
    assert data["kept"] == (scores >= data["threshold"]).sum()
    steps = data["first_step"] + np.arange(len(data["at_least"]))
    assert steps[0] / data["steps"] < scores.min()
    assert steps[-1] / data["steps"] > scores.max()
    assert 500 < len(steps) < 20_000
    for number in range(0, len(steps), 50):
        assert data["at_least"][number] == (scores >= steps[number] / data["steps"]).sum()


def test_the_threshold_of_another_kind_lies_in_its_range(run, tmp_path):
    folder = derive(shutil.copytree(run.output / "_scores", tmp_path / "scores"), "loss", np.negative, limits=(None, 0))
    with pytest.raises(ValueError, match=r"threshold is 0.25; a score of kind 'loss' lies in"):
        ReportConfig(scores=folder, output=tmp_path / "r.html", threshold=0.25)
