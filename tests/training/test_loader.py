import json
import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.training.keep_rate import StarvationError
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.types import DropReason, Sample
from tests.support.restore import (
    NUMBERS,
    Recipe,
    expected_keys,
    flat,
    image_number,
    keys,
    load_scorer,
    numbered_pair,
    text_number,
    threshold_that_keeps,
    write_numbered,
)
from tests.support.toys import tar_members, write_shard

# --- what is kept, and how it is packed ---


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize(
    ("batch_size", "score_batch_size", "num_workers", "shuffle"),
    [(1, 7, 0, 0), (5, 4, 0, 10), (7, 1, 0, 100), (4, 64, 2, 10), (100, 3, 0, 0)],
)
def test_batches_have_one_size_and_the_columns_of_a_row_belong_together(
    all_samples, scores, share, batch_size, score_batch_size, num_workers, shuffle
):
    recipe = all_samples.but(
        threshold=threshold_that_keeps(share, scores),
        batch_size=batch_size,
        score_batch_size=score_batch_size,
        num_workers=num_workers,
    ).but_dataset(shuffle=shuffle)
    batches = list(recipe.build())
    kept = expected_keys(recipe, scores)
    assert len(kept) == max(round(48 * share), 1)
    assert sorted(key for batch in batches for key in batch["__key__"]) == kept
    sizes = [len(batch["__key__"]) for batch in batches]
    assert sizes == [batch_size] * (len(kept) // batch_size) + [len(kept) % batch_size] * (len(kept) % batch_size > 0)
    for batch in batches:
        numbers = [int(key) for key in batch["__key__"]]
        assert batch["image"].tolist() == batch["text"].tolist() == numbers
        assert [int(Path(url).stem) for url in batch["__url__"]] == [number // 1000 for number in numbers]
        assert batch["score"].dtype is torch.float32
        assert batch["score"].shape == (len(numbers),)
        assert batch["score"].tolist() == pytest.approx([scores[key] for key in batch["__key__"]], abs=1e-6)
    dropped_last = list(recipe.but(drop_last=True).build())
    assert [b["__key__"] for b in dropped_last] == [b["__key__"] for b in batches if len(b["__key__"]) == batch_size]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_keeps_exactly_the_samples_that_rewrite_keeps(half, tmp_path, num_workers):
    config = RewriteConfig(
        shards=half.shards, output=tmp_path / "out", threshold=half.loader["threshold"], batch_size=16, num_workers=0
    )
    process_shards(config, load_scorer(half.clip))
    rewritten = {name.split(".")[0] for tar in (tmp_path / "out").glob("*.tar") for name, _ in tar_members(tar)}
    loader = half.build(num_workers=num_workers)
    inline = flat(keys(loader))
    assert sorted(inline) == sorted(rewritten)
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert (loader.stats.seen, loader.stats.kept) == (summary["seen"], summary["kept"])
    assert {str(reason): count for reason, count in loader.stats.dropped.items()} == summary["dropped"]


def test_without_threshold_every_usable_sample_comes_with_its_score(all_samples, tmp_path):
    good = numbered_pair(5)
    samples = [good, {"png": good["png"]}, {**good, "txt": b" "}, {**good, "png": b"\x89PNG"}, good]
    url = str(write_shard(tmp_path / "mixed.tar", samples))
    recipe = Recipe(clip=all_samples.clip, shards=[url], loader=all_samples.loader)
    loader = recipe.build()
    (batch,) = list(loader)
    assert batch["__key__"] == ["000000000", "000000004"]
    assert batch["score"][0] == batch["score"][1] != 0
    reasons = (DropReason.MISSING_CAPTION, DropReason.BLANK_CAPTION, DropReason.UNREADABLE_IMAGE)
    assert loader.stats.dropped == dict.fromkeys(reasons, 1)
    assert (loader.stats.seen, loader.stats.kept) == (5, 2)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_bad_shards_among_good_are_warned_of_once_and_the_accounting_closes(all_samples, tmp_path, caplog, num_workers):
    write_numbered(tmp_path, NUMBERS[:3])
    (tmp_path / "00003.tar").write_bytes(b"garbage" * 1000)
    torn = write_shard(tmp_path / "00004.tar", [numbered_pair(number) for number in range(6)], start=4000)
    torn.write_bytes(torn.read_bytes()[:-11_000])  # the end mark, its padding and the last caption
    (tmp_path / "00005.tar").write_bytes(b"")
    recipe = Recipe(clip=all_samples.clip, shards=f"{tmp_path}/*.tar", loader=all_samples.loader)
    loader = recipe.build(num_workers=num_workers)
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        read = [int(key) for key in flat(keys(loader))]
    cut = loader.stats.dropped[DropReason.TORN]
    assert cut == 1
    assert sorted(read) == [*NUMBERS[0], *NUMBERS[1], *NUMBERS[2], *range(4000, 4000 + loader.stats.kept - 36)]
    assert loader.stats.kept >= 40
    assert loader.stats.seen == loader.stats.kept + sum(loader.stats.dropped.values())
    warnings = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(warnings) == 1
    assert "00003.tar" in warnings[0]
    assert "not a tar archive" in warnings[0]


def test_a_shard_that_workers_share_is_warned_of_once(all_samples, tmp_path, caplog):
    write_numbered(tmp_path, NUMBERS[:2])
    (tmp_path / "0000.tar").write_bytes(b"garbage" * 1000)  # the first of three shards for four workers
    recipe = Recipe(clip=all_samples.clip, shards=f"{tmp_path}/*.tar", loader=all_samples.loader)
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        assert len(flat(keys(recipe.build(num_workers=4)))) == 24
    assert sum("left out" in record.getMessage() for record in caplog.records) == 1


def several_views(image):
    number = image_number(image)
    return [number, number]


def number_as_digits(caption):
    return [int(digit) for digit in f"{text_number(caption):05d}"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_views_of_several_parts_stay_with_their_samples(half, num_workers):
    views = {"image_transform": several_views, "text_transform": number_as_digits}
    loader = half.but_dataset(**views).build(num_workers=num_workers)
    for batch in loader:  # of 5 rows, and of 5 digits
        numbers = [int(key) for key in batch["__key__"]]
        assert [view.tolist() for view in batch["image"]] == [numbers] * 2
        digits = torch.stack(batch["text"], dim=1).tolist()
        assert [int("".join(map(str, row))) for row in digits] == numbers


# --- alarms ---


@pytest.mark.parametrize("options", [{}, {"end": "repeat", "batches_per_epoch": 3}, {"num_workers": 2}], ids=str)
def test_shards_that_keep_nothing_end_in_an_explained_error(half, scores, options):
    loader = half.build(threshold=0.9, **options)
    with pytest.raises(StarvationError) as starved:
        keys(loader)
    message = str(starved.value)
    assert "threshold is 0.9" in message
    assert "Lower the threshold" in message
    median, highest = np.median(list(scores.values())), max(scores.values())
    if not options:
        assert f"50%: {median:.3f}" in message
        assert f"100%: {highest:.3f}" in message
        assert "a whole epoch of 48 samples left none" in message
        assert "last 48 scores" in message


def test_starvation_is_told_within_the_limit(half):
    loader = half.build(threshold=0.9, starvation_limit=10)
    with pytest.raises(StarvationError, match="the last 12 samples left none"):
        keys(loader)
    assert loader.stats.seen <= 12


def test_shards_of_unusable_samples_only_end_in_an_error(all_samples, tmp_path):
    url = str(write_shard(tmp_path / "blank.tar", [{**numbered_pair(1), "txt": b""}] * 10))
    with pytest.raises(StarvationError, match="No sample could be scored"):
        keys(Recipe(clip=all_samples.clip, shards=[url], loader=all_samples.loader).build())


def test_an_empty_tail_after_a_resume_is_no_starvation(half):
    loader = half.build()
    iterator = iter(loader)
    assert len(list(islice(iterator, 5))) == 5
    state = loader.state_dict()
    iterator.close()
    resumed = half.build()
    resumed.load_state_dict(state)
    assert keys(resumed, 2) == [[], keys(half.build())[0]]


def test_a_collapse_of_the_keep_rate_is_warned_of(clip_folder, scores, all_samples, tmp_path, caplog):
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    order = ranked[:24] * 20 + ranked[24:] * 20
    write_shard(tmp_path / "00000.tar", [numbered_pair(int(key)) for key in order])
    recipe = Recipe(clip=clip_folder, shards=f"{tmp_path}/*.tar", loader=all_samples.loader)
    threshold = threshold_that_keeps(0.5, scores)
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        keys(recipe.build(threshold=threshold))
    assert sum("has the data changed" in record.getMessage() for record in caplog.records) == 1


# --- other loaders ---


def columns_of(recipe, batch_size=6):
    """Batches that somebody else's loader might make."""
    preprocess = load_scorer(recipe.clip).preprocess

    opened = []
    for url in expand_shards(recipe.shards):
        with open_shard(url) as shard:
            opened += [sample for sample in read_samples(shard, SampleLayout()) if isinstance(sample, Sample)]
    batches = []
    for first in range(0, len(opened), batch_size):
        samples = opened[first : first + batch_size]
        pixels, ids = preprocess.collate([preprocess.open_sample(sample, SampleLayout()) for sample in samples])
        numbers = [int(sample.key) for sample in samples]
        batches.append(
            {
                "pixel_values": pixels,
                "input_ids": ids.input_ids,
                "reason": [""] * len(samples),
                "number": torch.tensor(numbers),
                "meta": {"key": [sample.key for sample in samples], "pair": (torch.tensor(numbers), numbers)},
            }
        )
    return batches


def test_any_iterable_of_batches_is_filtered_with_all_its_columns(half, scores):
    batches = columns_of(half)
    threshold = half.loader["threshold"]
    loader = ClipFilterLoader(batches, load_scorer(half.clip), threshold=threshold, batch_size=5)
    for _ in range(2):
        kept = list(loader)
        assert [len(batch["number"]) for batch in kept] == [5, 5, 5, 5, 4]
        found = [key for batch in kept for key in batch["meta"]["key"]]
        assert found == expected_keys(half, scores)
        for batch in kept:
            numbers = batch["number"].tolist()
            assert [int(key) for key in batch["meta"]["key"]] == numbers
            assert batch["meta"]["pair"][0].tolist() == batch["meta"]["pair"][1] == numbers
            assert batch["score"].tolist() == pytest.approx([scores[k] for k in batch["meta"]["key"]], abs=1e-5)
            assert len(batch["pixel_values"]) == len(numbers)
    assert loader.stats.kept == 48


def test_columns_in_lists_and_columns_of_another_length_are_no_rows(half):
    batches = [{**batch, "crops": [batch["number"], -batch["number"]]} for batch in columns_of(half)]
    for batch in ClipFilterLoader(batches, load_scorer(half.clip), threshold=half.loader["threshold"], batch_size=5):
        assert [(sign * crop).tolist() for sign, crop in zip((1, -1), batch["crops"], strict=True)] == [
            batch["number"].tolist()
        ] * 2
    short = [{**batch, "number": batch["number"][:3]} for batch in columns_of(half)]
    with pytest.raises(ValueError, match="a batch of 6 samples has a column 'number' of 3 rows"):
        keys(ClipFilterLoader(short, load_scorer(half.clip), threshold=None))


def test_a_batch_without_the_columns_to_score_is_refused_by_name(half):
    loader = ClipFilterLoader([{"pixel_values": torch.zeros(1), "text": ["x"]}], load_scorer(half.clip))
    with pytest.raises(ValueError, match=r"has the columns \['pixel_values', 'text'\], but no input_ids"):
        keys(loader)


def test_a_loader_of_any_iterable_cant_be_resumed_and_says_so(half):
    loader = ClipFilterLoader(columns_of(half), load_scorer(half.clip), threshold=None)
    with pytest.raises(ValueError, match="only a loader of a ClipWebDataset can be resumed"):
        loader.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 2, "num_streams": 4}, r"num_workers=2, num_streams=4: this is for a ClipWebDataset"),
        ({"on_crash": "raise"}, r"on_crash='raise': this is for a ClipWebDataset, .* so set it there"),
        ({"end": "repeat", "batches_per_epoch": 3}, "end is 'repeat', which reads the shards of a ClipWebDataset"),
    ],
)
def test_around_another_loader_options_of_reading_are_refused(half, options, message):
    with pytest.raises(ValueError, match=message):
        ClipFilterLoader(columns_of(half), load_scorer(half.clip), threshold=None, **options)


def test_an_iterator_that_was_iterated_before_is_told_from_a_filter_that_keeps_nothing(half):
    loader = ClipFilterLoader(iter(columns_of(half)), load_scorer(half.clip), threshold=None, batch_size=6)
    assert len(flat([[batch["meta"]["key"] for batch in loader]])) == 48
    with pytest.raises(StarvationError, match=r"No sample was read: .* an iterator, which gives its batches only once"):
        next(iter(loader))
