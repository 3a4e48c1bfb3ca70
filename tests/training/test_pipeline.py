"""The filter as a stage of pipelines that people have already."""

import itertools
import threading

import pytest
import torch
import webdataset as wds
from torch.utils.data import DataLoader, Dataset

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset, DropReason, clip_filter
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.keep_rate import StarvationError
from tests.support.toys import make_clip, pair, write_shard

THRESHOLD = 0.06
NUM_SAMPLES, BLANK, UNREADABLE, NO_CAPTION, NO_IMAGE, PNG = 30, 4, 9, 11, 13, 15
COLUMNS = ("text", "__key__", "pixel_values", "input_ids", "reason")


@pytest.fixture(scope="module")
def samples():
    """Usable ones but for four, with members of other names, and one that lacks a member that the others have."""
    samples = [{**pair(number), "cls": str(number).encode()} for number in range(NUM_SAMPLES)]
    samples[BLANK]["txt"] = b" "
    samples[UNREADABLE]["jpg"] = b"no image"
    del samples[NO_CAPTION]["txt"], samples[NO_IMAGE]["jpg"], samples[20]["cls"]
    samples[PNG]["png"] = samples[PNG].pop("jpg")
    return samples


@pytest.fixture(scope="module")
def shard(samples, tmp_path_factory):
    return str(write_shard(tmp_path_factory.mktemp("in") / "0.tar", samples))


@pytest.fixture(scope="module")
def ours(shard, scorer):
    """What our own loader of these samples keeps and counts."""
    loader = ClipFilterLoader(ClipWebDataset(shard, scorer.preprocess), scorer, threshold=THRESHOLD)
    kept = kept_in(loader)
    assert 5 < len(kept) < NUM_SAMPLES - 5
    return kept, loader.stats


def kept_in(batches):
    return [
        (key, round(float(score), 5))
        for batch in batches
        for key, score in zip(batch["__key__"], batch["score"], strict=True)
    ]


def prepared(shard, scorer):
    return wds.WebDataset(shard, shardshuffle=False).map(scorer.preprocess)


# --- webdataset ---


@pytest.mark.parametrize("num_workers", [0, 1])
def test_in_a_webdataset_pipeline_it_keeps_and_counts_what_our_own_loader_does(shard, scorer, ours, num_workers):
    stage = clip_filter(scorer, threshold=THRESHOLD)
    pipeline = prepared(shard, scorer).batched(7)
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=num_workers).compose(stage).unbatched().batched(5)
    batches = list(loader)
    assert (kept_in(batches), stage.stats) == ours
    assert [len(batch["image"]) for batch in batches[:-1]] == [5] * (len(batches) - 1)
    assert {image.mode for batch in batches for image in batch["image"]} == {"RGB"}
    assert "reason" not in batches[0]


def test_what_webdataset_can_not_decode_never_comes_here_and_is_not_counted(shard, scorer, ours):
    decoded = wds.WebDataset(shard, shardshuffle=False).decode("pil", handler=wds.ignore_and_continue)
    stage = clip_filter(scorer, threshold=THRESHOLD)
    kept = kept_in(stage(decoded.map(scorer.preprocess).batched(64)))
    expected, stats = ours
    assert {key for key, _ in kept} == {key for key, _ in expected}
    assert stage.stats.seen == stats.seen - 1
    assert DropReason.UNREADABLE_IMAGE not in stage.stats.dropped


def test_tuples_are_filtered_by_the_names_of_their_columns(shard, scorer, ours):
    stage = clip_filter(scorer, threshold=THRESHOLD, columns=COLUMNS)
    batches = list(stage(prepared(shard, scorer).to_tuple(*COLUMNS).batched(7)))
    assert all(isinstance(batch, tuple) and len(batch) == len(COLUMNS) for batch in batches)
    named = [dict(zip((*COLUMNS[:-1], "score"), batch, strict=True)) for batch in batches]
    assert (kept_in(named), stage.stats) == ours


def test_samples_come_one_by_one_as_they_went(shard, scorer, ours):
    for columns in (None, COLUMNS):
        pipeline = prepared(shard, scorer)
        stage = clip_filter(scorer, threshold=THRESHOLD, columns=columns, batch_size=4)
        given = list(stage(pipeline.to_tuple(*columns) if columns else pipeline))
        named = given if columns is None else [dict(zip((*columns[:-1], "score"), row, strict=True)) for row in given]
        kept = [(sample["__key__"], round(sample["score"].item(), 5)) for sample in named]
        assert (kept, stage.stats) == ours
        assert named[0]["pixel_values"].shape == (3, 32, 32)


def test_samples_with_different_numbers_of_captions_are_filtered_in_lists(scorer, tmp_path):
    texts = ['["one"]', '["one", "two", "three"]', '[" "]', '["four", "five"]']
    members = [{**pair(number), "json": f'{{"texts": {text}}}'.encode()} for number, text in enumerate(texts)]
    shard, layout = str(write_shard(tmp_path / "0.tar", members)), SampleLayout(caption="json:texts")

    def prepare(sample):
        return scorer.preprocess(sample, layout)

    stage = clip_filter(scorer, threshold=None)
    pipeline = wds.WebDataset(shard, shardshuffle=False).map(prepare).listed(3)
    given = [sample for group in stage(pipeline) for sample in group]
    assert [sample["text"] for sample in given] == ["one", ["one", "two", "three"], ["four", "five"]]
    ours = kept_in(ClipFilterLoader(ClipWebDataset(shard, scorer.preprocess, layout=layout), scorer, threshold=None))
    assert [(sample["__key__"], round(sample["score"].item(), 5)) for sample in given] == ours


# --- torch, and anything that can be iterated ---


class Pairs(Dataset):
    def __init__(self, samples, scorer):
        self._samples, self._pair = samples, scorer.preprocess.pair

    def __len__(self):
        return len(self._samples)

    def __getitem__(self, index):
        sample = self._samples[index]
        caption = sample["txt"].decode() if "txt" in sample else None
        image = sample.get("jpg", sample.get("png"))
        return {"__key__": f"{index:09d}", "number": index, **self._pair(image, caption)}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_around_a_torch_loader_it_keeps_and_counts_the_same(samples, scorer, ours, num_workers):
    stage = clip_filter(scorer, threshold=THRESHOLD)
    batches = list(stage(DataLoader(Pairs(samples, scorer), batch_size=7, num_workers=num_workers)))
    assert (kept_in(batches), stage.stats) == ours
    assert [f"{number:09d}" for batch in batches for number in batch["number"].tolist()] == [key for key, _ in ours[0]]


def test_the_lists_that_torch_makes_of_tuples_are_filtered_like_tuples(samples, scorer, ours):
    names = ("__key__", "number", "pixel_values", "input_ids", "reason")
    pairs = [tuple(sample[name] for name in names) for sample in Pairs(samples, scorer)]
    stage = clip_filter(scorer, threshold=THRESHOLD, columns=names)
    named = [dict(zip((*names[:-1], "score"), batch, strict=True)) for batch in stage(DataLoader(pairs, batch_size=7))]
    assert (kept_in(named), stage.stats) == ours


def test_counts_are_of_all_iterations_and_whole_batches_of_dropped_pairs_are_left_out(samples, scorer, ours):
    stage = clip_filter(scorer, threshold=THRESHOLD)
    loader = DataLoader(Pairs(samples, scorer), batch_size=1)
    for _ in range(2):
        assert [len(batch["score"]) for batch in stage(loader)] == [1] * len(ours[0])
    assert stage.stats == ours[1] + ours[1]


def test_fast_scores_decide_as_float32_does_even_where_the_threshold_is_a_score(samples, scorer, clip_folder):
    fast = ClipScorer(clip_folder, device="cpu", precision="bf16")
    loader = DataLoader(Pairs(samples, scorer), batch_size=7)
    scores = sorted(score for batch in clip_filter(scorer, threshold=None)(loader) for score in batch["score"].tolist())
    for threshold in scores[len(scores) // 2 : len(scores) // 2 + 3]:
        kept = [
            [key for batch in clip_filter(model, threshold=threshold)(loader) for key in batch["__key__"]]
            for model in (scorer, fast)
        ]
        assert kept[0] == kept[1]


def test_an_endless_pipeline_is_read_a_bounded_number_of_samples_ahead(samples, scorer):
    pulled = itertools.count()
    good = Pairs(samples, scorer)[0]

    def endless():
        for _ in pulled:
            yield good

    kept = clip_filter(scorer, threshold=None, batch_size=8)(endless())
    assert len(list(itertools.islice(kept, 20))) == 20
    assert next(pulled) <= 20 + 2 * 8


def test_breaking_off_leaves_no_thread(samples, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wide = ClipScorer(make_clip(tmp_path, width=256, layers=1), device="cpu", precision="fp32")
        others = set(threading.enumerate())
        for _ in clip_filter(wide, threshold=None)(DataLoader(Pairs(samples[:4], wide), batch_size=1)):
            assert set(threading.enumerate()) > others, "a model of this width is computed in threads"
            break
        assert set(threading.enumerate()) == others
    finally:
        torch.set_num_threads(before)


# --- what is wrong ---


def test_a_pass_that_keeps_nothing_says_why(samples, scorer):
    pairs = [scorer.preprocess.pair(None, "a caption")] * 3 + [scorer.preprocess.pair(samples[0]["jpg"], "")]
    with pytest.raises(StarvationError, match="all 4 samples were dropped, 1 as blank_caption, 3 as missing_image"):
        list(clip_filter(scorer, threshold=THRESHOLD)(pairs))


def test_an_endless_stream_that_keeps_nothing_ends(scorer):
    stage = clip_filter(scorer, threshold=THRESHOLD, starvation_limit=200)
    with pytest.raises(StarvationError, match=r"the last 2\d\d samples left none"):
        list(stage(itertools.repeat(scorer.preprocess.pair(None, "a caption"))))


@pytest.mark.parametrize(
    ("item", "columns", "error"),
    [
        ({"image": [1], "reason": [""]}, None, r"columns \['image', 'reason'\], but no input_ids and no pixel_values"),
        ((1, 2), None, "is a tuple, and should be a dict; the names of a tuple's columns are given as `columns`"),
        ((1, 2), COLUMNS, "has 2 columns, but columns are"),
        ({"a": 1}, COLUMNS, "is a dict, and should be a tuple of"),
        (7, None, "is a int, and should be a dict"),
    ],
)
def test_what_can_not_be_filtered_is_named(scorer, item, columns, error):
    with pytest.raises((TypeError, ValueError), match=error):
        list(clip_filter(scorer, columns=columns)([item]))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threshold": 2.8}, "Did you mean 0.28"),
        ({"columns": ["image", "text"]}, "a filter also needs input_ids and pixel_values and reason"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"starvation_limit": 0}, "starvation_limit is 0"),
    ],
)
def test_options_that_can_not_be_used_are_refused(scorer, options, error):
    with pytest.raises(ValueError, match=error):
        clip_filter(scorer, **options)


def test_the_usual_threshold_may_be_named_and_a_model_may_not(scorer):
    assert repr(clip_filter(scorer, threshold="auto")) == repr(clip_filter(scorer, threshold=0.25))
    with pytest.raises(TypeError, match=r"scorer is 'demo-tiny'; give a ClipScorer of that model$"):
        clip_filter("demo-tiny")


def test_it_says_what_it_is_in_one_line(scorer, samples):
    stage = clip_filter(scorer, threshold=THRESHOLD)
    list(stage([scorer.preprocess.pair(samples[0]["jpg"], "a caption"), scorer.preprocess.pair(None, "a caption")]))
    assert repr(stage).endswith("threshold=0.06, stats=FilterStats(seen=2, kept=1, dropped={'missing_image': 1}))")
