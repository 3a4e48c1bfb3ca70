"""The corpus of bad images through the real stream: each is scored, or dropped for the stated reason."""

import resource
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import DropReason, UnusableError
from tests.support.corpus import BadImage, bombs, corpus, png, reference_reason, webp
from tests.support.processes import in_fresh_process
from tests.support.toys import encoded, photo, write_shard

MIB = 1 << 20


@pytest.fixture(scope="module")
def images() -> list[BadImage]:
    return corpus()


@pytest.fixture(scope="module")
def shard(images, tmp_path_factory):
    samples = [{image.extension: image.data, "txt": image.name.encode()} for image in images]
    return write_shard(tmp_path_factory.mktemp("corpus") / "corpus.tar", samples)


def expected_reason(image: BadImage) -> DropReason | None:
    """Why it is dropped, None if it is scored."""
    if isinstance(image.outcome, DropReason):
        return image.outcome
    if image.outcome == "scored":
        return None
    with warnings.catch_warnings(action="ignore"):
        return reference_reason(image.data)


@pytest.fixture(scope="module")
def expected(images) -> dict[str, DropReason | None]:
    return {image.name: expected_reason(image) for image in images}


def test_every_image_is_scored_or_dropped_for_the_stated_reason(scorer, shard, images, expected, tmp_path, capfd):
    assert len(expected) == len(images) > 400
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tally = process_shards(ScoreConfig(shards=shard, output=tmp_path, num_workers=0), scorer)
    scores = ShardScores.read(tmp_path / "corpus.parquet")
    reasons = scores.table["reason"].to_pylist()
    found = {image.name: reason for image, reason in zip(images, reasons, strict=True)}
    assert {name: (found[name], reason) for name, reason in expected.items() if found[name] != reason} == {}
    assert tally.counts.seen == len(images)
    assert sum(tally.counts.dropped.values()) == sum(reason is not None for reason in reasons)
    # Neither Pillow nor the C libraries behind it say a word.
    assert [str(warning.message) for warning in warned if "PIL" in warning.filename] == []
    assert capfd.readouterr() == ("", "")


def test_a_loader_hands_out_what_is_scored_and_nothing_else(scorer, shard, images, expected):
    loader = ClipFilterLoader(ClipWebDataset(shard, scorer.preprocess), scorer, threshold=None, num_workers=2)
    captions = [caption for batch in loader for caption in batch["text"]]
    # Two workers take turns with the samples of the only shard.
    assert sorted(captions) == sorted(name for name, reason in expected.items() if reason is None)
    assert loader.stats.seen == len(images)


def test_the_outcome_does_not_depend_on_the_warnings_filter(scorer, images, expected):
    for image in images:
        with warnings.catch_warnings(action="error"):
            try:
                scorer.preprocess.open_pair(image.data, "caption")
                reason = None
            except UnusableError as unusable:
                reason = unusable.reason
        assert reason == expected[image.name], image.name


def test_threads_that_decode_leave_the_warnings_filters_as_they_were(images):
    view = ImageView(resize=32, crop=(32, 32))
    data = [image.data for image in images if image.outcome == "scored" and "65000" not in image.name] * 4
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(view.decode, data))
    assert warnings.filters == before


# --- memory ---


def grown_by(shard: str, clip: str) -> tuple[int, dict[DropReason, int]]:
    """By how many bytes this process grows, at most, while it prepares a shard; and what was dropped."""
    torch.set_num_threads(1)
    scorer = ClipScorer(clip, device="cpu")
    dataset = ClipWebDataset(shard, scorer.preprocess)
    warm_up = scorer.preprocess.open_pair(encoded(photo(1, (640, 480))), "caption")
    pixel_values, tokens = scorer.preprocess.collate([warm_up])
    scorer(pixel_values, tokens.input_ids)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loader = ClipFilterLoader(dataset, scorer, threshold=None, score_batch_size=8, batch_size=8)
    for _ in loader:
        pass
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), dict(loader.stats.dropped)


def test_memory_stays_flat_with_a_bomb_in_every_sample(clip_folder, tmp_path):
    samples = [{bomb.extension: bomb.data, "txt": b"a bomb"} for bomb in bombs()] * 5
    shard = write_shard(tmp_path / "0.tar", [*samples, {"jpg": encoded(photo(1)), "txt": b"a photo"}])
    grown, dropped = in_fresh_process(grown_by, str(shard), str(clip_folder))
    assert dropped == {DropReason.IMAGE_TOO_LARGE: len(samples)}
    assert grown < 64 * MIB


def largest_images() -> dict[str, bytes]:
    """Of just as many pixels as are allowed, in the modes that take the most memory."""
    side = 9_459
    grey16 = Image.new("I;16", (side, side))
    palette = Image.new("P", (side, side))
    return {
        "rgb": png(side, side),
        "webp": webp(side, side),
        "16-bit": encoded(grey16, "PNG", compress_level=1),
        "transparent": encoded(palette, "PNG", compress_level=1, transparency=0),
    }


@pytest.mark.slow
def test_the_largest_images_that_are_allowed_take_the_stated_memory(clip_folder, tmp_path):
    for name, data in largest_images().items():
        shard = write_shard(tmp_path / f"{name}.tar", [{"png": data, "txt": b"large"}] * 2)
        grown, dropped = in_fresh_process(grown_by, str(shard), str(clip_folder))
        assert dropped == {}
        # What SECURITY.md states: per process that decodes, for any one sample.
        assert grown < 2048 * MIB, (name, grown / MIB)


@pytest.mark.slow
def test_nor_does_the_largest_image_in_the_largest_file_beside_others(clip_folder, tmp_path):
    data = largest_images()["transparent"]
    members = {extension: data + bytes(256 * MIB - len(data)) for extension in ("webp", "png", "jpg")}
    shard = write_shard(tmp_path / "0.tar", [{**members, "txt": b"large"}])
    grown, dropped = in_fresh_process(grown_by, str(shard), str(clip_folder))
    assert dropped == {}
    assert grown < 2048 * MIB, grown / MIB
