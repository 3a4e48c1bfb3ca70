"""The filter on Hugging Face datasets, and in torchdata's pipelines."""

import pytest
from torch.utils.data import DataLoader

from clipfilter_wds import ClipFilterLoader, ClipWebDataset, clip_filter
from tests.support.toys import pair, write_shard

THRESHOLD = 0.06
NUM_PAIRS, BLANK, UNREADABLE, NO_CAPTION, NO_IMAGE = 24, 4, 9, 11, 13
NAMES = ["image", "caption"]


@pytest.fixture(scope="module")
def images():
    return [b"no image" if number == UNREADABLE else pair(number)["jpg"] for number in range(NUM_PAIRS)]


@pytest.fixture(scope="module")
def captions():
    return [f"photo number {number}" for number in range(NUM_PAIRS)]


@pytest.fixture(scope="module")
def rows(images, captions):
    """Pairs as Hugging Face has them when it doesn't decode."""
    rows = [
        {"image": {"bytes": image, "path": None}, "caption": caption, "number": number}
        for number, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]
    rows[BLANK]["caption"], rows[NO_CAPTION]["caption"], rows[NO_IMAGE]["image"] = " ", None, None
    return rows


@pytest.fixture(scope="module")
def ours(images, captions, scorer, tmp_path_factory):
    """The numbers that our own loader keeps of these pairs, and its counts."""
    samples = [{"jpg": image, "txt": caption.encode()} for image, caption in zip(images, captions, strict=True)]
    samples[BLANK]["txt"] = b" "
    del samples[NO_CAPTION]["txt"], samples[NO_IMAGE]["jpg"]
    shard = write_shard(tmp_path_factory.mktemp("in") / "0.tar", samples)
    loader = ClipFilterLoader(ClipWebDataset(shard, scorer.preprocess), scorer, threshold=THRESHOLD)
    kept = [int(key) for batch in loader for key in batch["__key__"]]
    assert 5 < len(kept) < NUM_PAIRS - 5
    return kept, loader.stats


@pytest.fixture(scope="module", params=["in memory", "streaming"])
def dataset(request, rows):
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    features = datasets.Features({**features, "number": datasets.Value("int64")})
    dataset = datasets.Dataset.from_list(rows, features=features)
    return dataset.to_iterable_dataset() if request.param == "streaming" else dataset


def test_its_filter_keeps_and_counts_what_our_own_loader_does(dataset, scorer, ours):
    stage = clip_filter(scorer, threshold=THRESHOLD, batch_size=4)
    kept = dataset.filter(stage.keeps, batched=True, batch_size=10, input_columns=NAMES)
    assert ([row["number"] for row in kept], stage.stats) == ours


def test_its_map_adds_what_the_filter_needs_and_leaves_the_images_as_they_are(dataset, rows, scorer, ours):
    mapped = dataset.map(scorer.preprocess.pair, input_columns=NAMES)
    assert [row["image"] for row in mapped] == [row["image"] for row in rows]
    stage = clip_filter(scorer, threshold=THRESHOLD)
    assert ([row["number"] for row in stage(mapped)], stage.stats) == ours


def test_a_torch_loader_of_it_is_filtered_in_batches(dataset, scorer, ours):
    mapped = dataset.map(scorer.preprocess.pair, input_columns=NAMES)
    loader = DataLoader(mapped.remove_columns(NAMES).with_format("torch"), batch_size=7)
    stage = clip_filter(scorer, threshold=THRESHOLD)
    assert ([number for batch in stage(loader) for number in batch["number"].tolist()], stage.stats) == ours


def test_decoded_images_are_taken_too(images, scorer, ours):
    datasets = pytest.importorskip("datasets")
    good = [number for number in ours[0] if number != UNREADABLE]
    rows = [{"image": images[number], "caption": f"photo number {number}", "number": number} for number in good]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    stage = clip_filter(scorer, threshold=THRESHOLD)
    kept = dataset.filter(stage.keeps, batched=True, batch_size=10, input_columns=NAMES)
    assert kept["number"] == good


def test_columns_that_a_dataset_has_not_are_an_error_that_lists_them(dataset, scorer):
    with pytest.raises((ValueError, KeyError), match="picture"):
        list(dataset.map(scorer.preprocess.pair, input_columns=["picture", "caption"]))
    with pytest.raises(ValueError, match=r"a sample has the columns \['image', 'caption', 'number'\]"):
        list(dataset.map(scorer.preprocess))


def test_nodes_of_torchdata_are_filtered_like_any_iterable(rows, scorer, ours):
    nodes = pytest.importorskip("torchdata.nodes")

    def prepare(row):
        return {"number": row["number"], **scorer.preprocess.pair(row["image"], row["caption"])}

    source = nodes.ParallelMapper(nodes.IterableWrapper(rows), prepare, num_workers=2, method="thread")
    stage = clip_filter(scorer, threshold=THRESHOLD)
    loader = nodes.Loader(nodes.Batcher(source, batch_size=7, drop_last=False))
    assert ([row["number"] for group in stage(loader) for row in group], stage.stats) == ours
