"""``resize_on_device``: whatever reads and scores, decisions are float32's, and those of views that workers make."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.offline.blocks import BlockDataset
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.tables.scoring import Pair, score_pairs
from clipfilter_wds.workers.pool import iterating, worker_loader
from clipfilter_wds.workers.transport import lent
from tests.support.outputs import bits, check_accounting
from tests.support.toys import encoded, make_clip, photo, write_shard

#: Width and height of photographs, none of which is resized to less than a quarter: there pixels are the same bits.
SIZES = [(64, 64), (200, 150), (90, 240), (256, 256), (33, 47), (255, 131)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)


@pytest.fixture(scope="module")
def models(folder):
    """By precision and whether the device resizes."""
    return {
        (precision, on_device): ClipScorer(folder, device="cpu", precision=precision, resize_on_device=on_device)
        for precision in ("fp32", "bf16")
        for on_device in (False, True)
    }


def sample(seed: int) -> dict[str, bytes]:
    """One of every six is no plain JPEG, and one of every nine is cut."""
    image, text = photo(seed, SIZES[seed % len(SIZES)]), f"photo number {seed}".encode()
    if seed % 6 == 3:
        return {"png": encoded(image.convert("P" if seed % 4 else "L"), "PNG"), "txt": text}
    if seed % 9 == 4:
        return {"jpg": encoded(image, quality=90)[:-60], "txt": text}
    return {"jpg": encoded(image.convert("CMYK") if seed % 7 == 5 else image, quality=90), "txt": text}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    paths = tmp_path_factory.mktemp("shards")
    for number in range(2):
        write_shard(paths / f"{number}.tar", map(sample, range(50 * number, 50 * number + 50)))
    return f"{paths}/*.tar"


def scored(shards, output, model) -> list[ShardScores]:
    process_shards(ScoreConfig(shards=shards, output=output, num_workers=0, batch_size=16), model)
    return [ShardScores.read(path) for path in sorted(output.glob("*.parquet"))]


# --- scores and decisions ---


def test_scores_are_those_of_views_that_workers_make(models, shards, tmp_path):
    plain, found = (scored(shards, tmp_path / str(on), models["fp32", on]) for on in (False, True))
    for expected, scores in zip(plain, found, strict=True):
        for column in ("key", "reason", "width", "height"):
            assert scores.table[column].equals(expected.table[column])
        assert np.array_equal(scores.scores, expected.scores, equal_nan=True)
    assert "unreadable_image" in found[0].table["reason"].to_pylist()


@pytest.mark.parametrize("turn", range(3))
def test_decisions_in_low_precision_are_those_of_float32(models, shards, tmp_path, turn):
    exact = scored(shards, tmp_path / "exact", models["fp32", True])
    cosines = np.sort(np.concatenate([scores.scores[scores.usable] for scores in exact]))
    threshold = float(cosines[(turn + 1) * len(cosines) // 4])  # it lies on a score
    config = RewriteConfig(shards=shards, output=tmp_path / "out", threshold=threshold, num_workers=0, batch_size=16)
    process_shards(config, models["bf16", True])
    for expected, path in zip(exact, sorted((tmp_path / "out" / "_scores").glob("*.parquet")), strict=True):
        found, usable = ShardScores.read(path).scores, expected.usable
        assert np.array_equal(
            COSINES.passes(found[usable], threshold), COSINES.passes(expected.scores[usable], threshold)
        )
    assert check_accounting(tmp_path / "out")["rechecked"] > 0


def test_training_keeps_what_it_keeps_without(models, shards):
    def kept(on_device: bool, num_workers: int) -> list[tuple]:
        scorer = models["fp32", on_device]
        dataset = ClipWebDataset(shards, scorer.preprocess, image_transform=image_sum)
        loader = ClipFilterLoader(dataset, scorer, threshold=0.1, batch_size=4, num_workers=num_workers)
        return [
            (key, size, score)
            for batch in loader
            for key, size, score in zip(batch["__key__"], batch["image"].tolist(), batch["score"].tolist(), strict=True)
        ]

    expected = kept(False, 0)
    assert 0 < len(expected) < 90
    assert kept(True, 0) == expected
    assert sorted(kept(True, 2)) == sorted(expected)


def image_sum(image: Image.Image) -> torch.Tensor:
    """Tells whether training gets the image that was decoded."""
    return torch.tensor([*image.size, int(np.asarray(image, dtype=np.int64).sum())])


def test_training_on_clips_own_views_is_refused(models, shards):
    with pytest.raises(ValueError, match="give an image_transform, or make the scorer without resize_on_device"):
        ClipWebDataset(shards, models["fp32", True].preprocess)


def test_tables_of_image_paths_are_scored_alike(models, tmp_path):
    for seed in range(12):
        (tmp_path / str(seed)).write_bytes(next(iter(sample(seed).values())))
    pairs = [Pair(str(seed), f"photo number {seed}") for seed in range(12)]
    found = []
    for on_device in (False, True):
        recheck = Recheck(models["fp32", on_device], 0.1)
        [(_, scores)] = score_pairs([(None, pairs)], recheck, folder=tmp_path, num_workers=1)
        found.append((scores.similarity.tolist(), scores.reasons))
    assert found[0] == found[1]


# --- workers and slots ---


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lend", [False, True])
def test_packed_images_come_out_of_workers_as_they_are(models, shards, method, lend):
    dataset = BlockDataset(urls=tuple(sorted_urls(shards)), preprocess=models["fp32", True].preprocess, batch_size=7)
    expected = {key_of(block): block.prepared for block in dataset}
    loader = worker_loader(dataset, num_workers=2, lend=lend, multiprocessing_context=method)
    num_blocks = 0
    with iterating(loader) as blocks:
        for borrowed in map(lent, blocks):
            found, whole = borrowed.item.prepared, expected[key_of(borrowed.item)]
            assert found.rows == whole.rows
            assert np.array_equal(found.pixel_values.places, whole.pixel_values.places)
            views = [models["fp32", True].views(each.pixel_values) for each in (found, whole)]
            assert torch.equal(*views)
            assert torch.equal(found.input_ids, whole.input_ids)
            borrowed.release()
            num_blocks += 1
    assert num_blocks == len(expected)


def sorted_urls(pattern: str) -> list[str]:
    return ClipWebDataset(pattern).urls


def key_of(block) -> tuple:
    """Blocks are the same however many workers read; the last one of a part may be empty."""
    return block.part.url, tuple(block.prepared.rows.keys), block.part.part if not len(block.prepared.rows) else 0


# --- outputs ---


def test_an_interrupted_run_ends_in_the_same_bits_with_other_workers(models, shards, tmp_path):
    def run(output, num_workers: int) -> None:
        config = RewriteConfig(shards=shards, output=output, threshold=0.1, num_workers=num_workers, batch_size=8)
        process_shards(config, models["bf16", True])

    run(tmp_path / "whole", 0)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for name in ("1.tar", "1_stats.json", "_scores/1.parquet", "summary.json"):
        (tmp_path / "resumed" / name).unlink()
    run(tmp_path / "resumed", 2)
    assert bits(tmp_path / "resumed") == bits(tmp_path / "whole")


def test_the_fingerprint_tells_it_and_a_run_with_the_other_value_is_refused(folder, shards, tmp_path, command):
    options = [shards, "--output", tmp_path / "out", "--model", folder, "--num_workers", 0, "--device", "cpu"]
    code, said = command("score", *options)
    assert code == 0, said
    code, said = command("score", *options, "--resize_on_device")
    assert code == 2
    assert "resize_on_device false there, true here" in " ".join(said.split())


def test_tables_from_before_there_was_the_option_are_those_of_a_run_without(models, shards, tmp_path):
    scored(shards, tmp_path, models["fp32", False])
    path = tmp_path / "0.parquet"
    scores = ShardScores.read(path)
    fingerprint = dict(scores.metadata.fingerprint)
    del fingerprint["resize_on_device"]
    with path.open("wb") as file:
        replace(scores, metadata=replace(scores.metadata, fingerprint=fingerprint)).write(file)
    config = ScoreConfig(shards=shards, output=tmp_path, num_workers=0, batch_size=16)
    process_shards(config, models["fp32", False])
    assert "resize_on_device" not in ShardScores.read(path).metadata.fingerprint  # it was not made again


def test_help_and_yaml_have_it(folder, shards, tmp_path, command):
    assert "--resize_on_device" in command("rewrite", "--help")[1]
    options = {"resize_on_device": True, "model": str(folder), "device": "cpu", "num_workers": 0}
    (tmp_path / "run.yaml").write_text(json.dumps(options))
    code, said = command("score", shards, "--output", tmp_path / "out", "--config", tmp_path / "run.yaml")
    assert code == 0, said
    assert ShardScores.read(tmp_path / "out" / "0.parquet").metadata.fingerprint["resize_on_device"] is True
