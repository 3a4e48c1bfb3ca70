"""Runs of ``rescore`` and ``dedup`` over folders: what is written, and that nothing but the settings changes it."""

import json
import shutil

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig
from clipfilter_wds.offline.rescoring.progress import run_with_progress
from clipfilter_wds.offline.rescoring.run import rescore_shards
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.rescore.row_sample import row_hashes
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import DropReason
from clipfilter_wds.world import World
from tests.offline.rescoring.conftest import NAMES, NEG, files, tables
from tests.support.embeddings import pair_embeddings, unit_rows, write_scored


def all_rows(folder) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """The embeddings of what could be scored, in float64, by name and index."""
    rows = {}
    for name, table in tables(folder).items():
        image, text = (np.load(folder / "_embeddings" / f"{name}.{tower}.npy") for tower in ("image", "text"))
        rows |= {(name, int(i)): (image[i].astype(float), text[i].astype(float)) for i in np.flatnonzero(table.usable)}
    return rows


def new_scores(folder) -> dict[tuple[str, int], float]:
    return {
        (name, int(index)): float(table.scores[index])
        for name, table in tables(folder).items()
        for index in np.flatnonzero(table.usable)
    }


def check_accounting(folder, tally) -> dict:
    summary = json.loads((folder / "summary.json").read_bytes())
    assert summary["seen"] == summary["kept"] + sum(summary["dropped"].values()) == tally.counts.seen
    assert summary["kept"] == sum(table.usable.sum() for table in tables(folder).values())
    return summary


# --- what the scores are ---


def test_neg_clip_loss_of_a_run_equals_the_definition(scored, tmp_path):
    tally = rescore_shards(RescoreConfig(scores=scored, output=tmp_path, **NEG))
    rows = all_rows(scored)
    hashes = {row: int(row_hashes(0, row[0], np.array([row[1]]))[0]) for row in rows}
    drawn = sorted(rows, key=hashes.get)[:60]
    expected = {}
    for row, (image, text) in rows.items():
        loss = 0.0
        for batch in (drawn[:20], drawn[20:40], drawn[40:]):
            members = [rows[other] for other in {*batch, row}]
            loss += np.log(sum(np.exp(image @ other / 0.05) for _, other in members))
            loss += np.log(sum(np.exp(other @ text / 0.05) for other, _ in members))
        expected[row] = image @ text - 0.05 / 2 * loss / 3
    found = new_scores(tmp_path)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([*found.values()], [expected[row] for row in found], atol=1e-5)
    assert check_accounting(tmp_path, tally)["derived"]["method"] == "neg_clip_loss"


def test_with_fewer_pairs_than_the_batches_take_all_are_one_batch(scored, tmp_path):
    for output, batches in (("few", {"num_batches": 10}), ("one", {"num_batches": 1, "batch_size": 144})):
        rescore_shards(RescoreConfig(scores=scored, output=tmp_path / output, method="neg_clip_loss", **batches))
    assert len(new_scores(tmp_path / "few")) == 144
    assert new_scores(tmp_path / "few") == new_scores(tmp_path / "one")


@pytest.mark.parametrize("method", ["norm_sim_2", "norm_sim_inf"])
def test_norm_sim_of_a_run_equals_the_definition(scored, tmp_path, method):
    target = write_scored(tmp_path / "target", {"t": pair_embeddings(np.random.default_rng(1), 50, 16)})
    rescore_shards(RescoreConfig(scores=scored, output=tmp_path / "out", method=method, target=target))
    images = np.load(target / "_embeddings" / "t.image.npy").astype(float)
    images = images[ShardScores.read(target / "t.parquet").usable]
    rows = all_rows(scored)
    for row, score in new_scores(tmp_path / "out").items():
        products = np.abs(images @ rows[row][0])
        expected = (products**2).sum() ** 0.5 if method == "norm_sim_2" else products.max()
        assert score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ["sum", "product", "min_rank"])
def test_scores_of_several_folders_are_combined_sample_by_sample(scored, derived, tmp_path, method):
    options = {"weights": "1,0.5"} if method == "sum" else {}
    rescore_shards(RescoreConfig(scores=[scored, derived], output=tmp_path, method=method, **options))
    a, b = new_scores(scored), new_scores(derived)

    def rank(scores: dict, row: tuple) -> float:
        return sum(score < scores[row] for score in scores.values()) / len(scores)

    combined = {
        "sum": lambda row: a[row] + 0.5 * b[row],
        "product": lambda row: a[row] * b[row],
        "min_rank": lambda row: min(rank(a, row), rank(b, row)),
    }[method]
    found = new_scores(tmp_path)
    assert found.keys() == a.keys()
    np.testing.assert_allclose([*found.values()], [combined(row) for row in found], atol=1e-6)


def test_then_keeps_the_best_by_one_score_and_of_these_the_best_of_all_by_the_next(scored, derived, tmp_path):
    config = RescoreConfig(scores=f"{derived},{scored}", output=tmp_path, method="then", fractions="0.5,0.2")
    tally = rescore_shards(config)
    first, second = new_scores(derived), new_scores(scored)
    best = sorted(first, key=first.get, reverse=True)[: round(0.5 * len(first))]
    best = sorted(best, key=second.get, reverse=True)[: round(0.2 * len(first))]
    found = new_scores(tmp_path)
    assert set(found) == set(best)
    assert found == {row: second[row] for row in found}
    assert check_accounting(tmp_path, tally)["dropped"]["not_selected"] == len(first) - len(best)
    assert ScoreFolder(tmp_path).kind.is_cosine


def test_dedup_keeps_the_best_of_near_duplicates(tmp_path):
    rng = np.random.default_rng(0)
    distinct = unit_rows(rng, 60, 16)
    scenes = {name: rng.integers(0, 60, 30) for name in NAMES}
    pairs = {name: pair_embeddings(rng, 30, 16) for name in NAMES}
    for name, pair in pairs.items():
        pair.image[:] = distinct[scenes[name]]
    scores = {name: rng.choice(np.float32([0.1, 0.2, 0.3]), 30) for name in NAMES}  # many are equal
    scored = write_scored(tmp_path / "scored", pairs, scores=scores)
    tally = rescore_shards(DedupConfig(scores=scored, output=tmp_path / "out"))
    best: dict[int, tuple] = {}
    for (name, index), score in new_scores(scored).items():
        scene = int(scenes[name][index])
        best[scene] = min(best.get(scene, (1.0,)), (-score, name, index))
    found = new_scores(tmp_path / "out")
    assert set(found) == {(name, index) for _, name, index in best.values()}
    assert found == {row: new_scores(scored)[row] for row in found}
    dropped = check_accounting(tmp_path / "out", tally)["dropped"]
    assert dropped == {"unreadable_image": 16, "near_duplicate": 104 - len(best)}
    assert tables(tmp_path / "out")["00000"].metadata.kind.is_cosine


def test_what_was_dropped_is_not_scored_and_what_has_no_score_keeps_its_reason(scored, tmp_path):
    rescore_shards(DedupConfig(scores=scored, output=tmp_path / "distinct", similarity=0.5))
    config = RescoreConfig(scores=tmp_path / "distinct", output=tmp_path / "out", embeddings=scored, **NEG)
    rescore_shards(config)
    for name, before in tables(tmp_path / "distinct").items():
        after = tables(tmp_path / "out")[name]
        np.testing.assert_array_equal(after.reasons, before.reasons)
        assert set(before.dropped) == {DropReason.UNREADABLE_IMAGE, DropReason.NEAR_DUPLICATE}
        assert not after.scores[~after.usable].any()
        columns = [column for column in before.table.column_names if column != "score"]
        assert after.table.select(columns).equals(before.table.select(columns))


def test_a_sample_without_embeddings_gets_no_score_of_them(tmp_path):
    """Its cosine is one of float32, where the fast pass gave no number."""
    pair = pair_embeddings(np.random.default_rng(0), 10, 8)
    scores = {"0": np.full(10, 0.3, dtype=np.float32)}
    pair.image[3], pair.text[3] = 0, 0
    folder = write_scored(tmp_path / "scored", {"0": pair}, scores=scores, bad_every=0)
    tally = rescore_shards(RescoreConfig(scores=folder, output=tmp_path / "neg", method="neg_clip_loss"))
    assert tally.counts.dropped == {"not_finite": 1}
    assert not ShardScores.read(tmp_path / "neg" / "0.parquet").usable[3]


# --- what they don't depend on ---


@pytest.mark.parametrize("config", [lambda **each: RescoreConfig(**each, **NEG), DedupConfig], ids=["rescore", "dedup"])
def test_a_run_that_was_stopped_resumes_to_the_same_bytes(scored, tmp_path, config):
    rescore_shards(config(scores=scored, output=tmp_path / "whole"))
    num_shards = []

    def stop(tally) -> None:
        num_shards.append(tally.done)
        if tally.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rescore_shards(config(scores=scored, output=tmp_path / "out"), on_progress=stop)
    assert len(files(tmp_path / "out")) == 2
    tally = rescore_shards(config(scores=scored, output=tmp_path / "out"))
    assert (tally.resumed, tally.done) == (2, 4)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (tally.counts.seen, tally.num_scored) == (166, 166 - 81)


@pytest.mark.parametrize("config", [lambda **each: RescoreConfig(**each, **NEG), DedupConfig], ids=["rescore", "dedup"])
def test_columns_that_were_joined_to_the_tables_later_come_along(scored, tmp_path, config):
    scores = shutil.copytree(scored, tmp_path / "scores")
    run = config(scores=scores, output=tmp_path / "out")
    rescore_shards(run)
    for resumed, weight in ((3, 0.5), (3, np.nan), (4, np.nan)):
        [path, *_] = sorted(scores.glob("*.parquet"))
        table = pq.read_table(path)
        plain = table.select([name for name in table.column_names if name != "weight"])
        pq.write_table(plain.append_column("weight", pa.array([weight] * table.num_rows)), path)
        assert rescore_shards(run).resumed == resumed
        found = tables(tmp_path / "out")[path.stem].table["weight"].to_numpy()
        np.testing.assert_array_equal(found, [weight] * table.num_rows)


def test_ranks_write_what_one_process_writes(scored, derived, tmp_path):
    config = RescoreConfig(scores=scored, output=tmp_path, **NEG)
    for rank in (2, 1, 0):
        tally = rescore_shards(config, world=World(rank=rank, world_size=3))
    assert tally.done == 4
    assert files(tmp_path) == files(derived)


def test_the_place_of_the_folder_changes_nothing(scored, derived, tmp_path):
    shutil.copytree(scored, tmp_path / "moved" / "_scores", ignore=shutil.ignore_patterns("_embeddings"))
    shutil.copytree(scored / "_embeddings", tmp_path / "moved" / "_embeddings")
    rescore_shards(RescoreConfig(scores=tmp_path / "moved", output=tmp_path / "out", **NEG))
    assert files(tmp_path / "out") == files(derived)


def test_another_storage_gets_the_same_bytes_and_the_last_line_says_to_copy_them(scored, derived, tmp_path, capsys):
    run_with_progress(RescoreConfig(scores=scored, output="memory://neg", **NEG))
    said = " ".join(capsys.readouterr().out.split())
    assert "copy them to a local folder COPY, and clipfilter-wds rewrite SHARDS --scores COPY --keep_fraction" in said
    found = fsspec.filesystem("memory")
    assert {name: found.cat(f"/neg/{name}") for name in files(derived)} == files(derived)
    tally = rescore_shards(RescoreConfig(scores=scored, output="memory://neg", **NEG))
    assert tally.resumed == tally.num_shards == 4
    found.rm("/neg", recursive=True)


def test_shards_that_could_not_be_scored_are_still_named(scored, tmp_path):
    shutil.copytree(scored, tmp_path / "scores")
    failed = {"/data/9.tar": "it is no tar"}
    (tmp_path / "scores" / "summary.json").write_text(json.dumps({"failed_shards": failed}))
    rescore_shards(DedupConfig(scores=tmp_path / "scores", output=tmp_path / "out"))
    assert ScoreFolder(tmp_path / "out").failed == failed
