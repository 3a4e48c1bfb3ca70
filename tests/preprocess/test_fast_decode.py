"""``fast_decode``: large JPEGs are decoded at a fraction of their size, for the model only, and scores tell of it."""

import io
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image, ImageOps

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset, ScoreFolder
from clipfilter_wds.cli import main
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.preprocess.image import ImageView, RgbImage
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.types import UnusableError
from tests.support.corpus import corpus
from tests.support.toys import encoded, photo, write_shard

PLAIN = ImageView(resize=32, crop=(32, 32))
VIEWS = {
    "model": PLAIN,
    "pillow": replace(PLAIN, resampler="pillow"),
    "squashed": replace(PLAIN, resize=(32, 24), crop=(32, 24)),
    "larger than the crop": replace(PLAIN, resize=40),
}


def fast(view: ImageView) -> ImageView:
    return replace(view, fast_decode=True)


def decoded_size(view: ImageView, data: bytes) -> tuple[int, int]:
    return view.decode(data).image.size


# --- what is seen ---


@pytest.mark.parametrize(
    ("stored", "decoded"),
    [
        ((63, 64), (63, 64)),
        ((64, 63), (64, 63)),
        ((64, 64), (32, 32)),
        ((131, 127), (66, 64)),
        ((128, 200), (32, 50)),
        ((1000, 255), (250, 64)),
        ((300, 256), (38, 32)),
        ((2048, 4096), (256, 512)),
        ((31, 900), (31, 900)),
        ((1, 1), (1, 1)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_is_not_below_the_models_size(stored, decoded):
    rgb = fast(PLAIN).decode(encoded(photo(1, stored)))
    assert rgb.image.size == decoded
    assert (rgb.width, rgb.height) == stored
    assert (rgb.scale > 1) == (decoded != stored)


@settings(max_examples=60)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(sorted(VIEWS)))
def test_no_image_is_decoded_below_the_models_size_nor_at_more_than_twice_of_it(width, height, name):
    view = fast(VIEWS[name])
    data = encoded(photo(1, (width, height)), quality=95)
    found = decoded_size(view, data)
    rows, columns = view.resize if isinstance(view.resize, tuple) else (view.resize, view.resize)
    assert found == (width, height) or (found[0] >= columns and found[1] >= rows)
    # An eighth is the smallest that a JPEG can be decoded at. Sizes are rounded up.
    assert found[0] <= 2 * columns or found[1] <= 2 * rows or found[0] <= -(-width // 8)
    exact, near = (each(each.decode(data)).int() for each in (VIEWS[name], view))
    assert (exact - near).abs().max() <= 24  # of 256 levels; a row or column that is lacking would be black


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("size", [(512, 384), (511, 383), (131, 257), (90, 1000)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_the_view_hardly_differs(name, size, mode, progressive):
    view = VIEWS[name]
    image = ImageOps.mirror(photo(3, size)).convert(mode)
    data = encoded(image, quality=95, progressive=progressive)
    assert decoded_size(fast(view), data) < decoded_size(view, data)
    exact, near = (each(each.decode(data)).int() for each in (view, fast(view)))
    assert exact.shape == near.shape
    # In levels of 256; also where the scale does not divide the size, so that the last column is a cut one.
    drift = (exact - near).abs().float()
    assert drift.mean() < 0.75
    assert drift.max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned, plain = (fast(PLAIN).decode(encoded(photo(1, (200, 160)), **more)) for more in ({"exif": exif}, {}))
    assert turned.image.size == (50, 40)
    assert turned.image.tobytes() == plain.image.tobytes()


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF"])
def test_other_formats_are_decoded_as_ever(image_format):
    data = encoded(photo(1, (300, 200)), image_format)
    exact, near = (view.decode(data).image for view in (PLAIN, fast(PLAIN)))
    assert exact.size == near.size == (300, 200)
    assert exact.tobytes() == near.tobytes()


def test_several_pictures_in_a_jpeg_are_the_first(tmp_path):
    first, second = photo(1, (300, 200)), photo(2, (300, 200))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    found = fast(PLAIN).decode(data).image
    assert found.size == (75, 50)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(first.resize((75, 50)))).mean() < 3


# --- what is dropped ---


def outcome(view: ImageView, data: bytes) -> str:
    try:
        rgb = view.decode(data)
    except UnusableError as unusable:
        return unusable.reason
    return f"{rgb.width} x {rgb.height}"


def test_what_can_not_be_read_is_what_can_not_be_read_in_full():
    view = ImageView(resize=8, crop=(8, 8))  # small, so that most are decoded at a fraction
    images = [image for image in corpus() if image.data[:2] == b"\xff\xd8"]
    assert len(images) > 40
    found = {image.name: (outcome(fast(view), image.data), outcome(view, image.data)) for image in images}
    readable = [image for image in images if "x" in found[image.name][0]]
    assert sum(fast(view).decode(image.data).scale > 1 for image in readable) > 20
    assert {name: both for name, both in found.items() if both[0] != both[1]} == {}


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_cut_jpeg_is_unreadable_wherever_it_is_cut(progressive):
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), quality=90, progressive=progressive)
    cuts = [*range(0, len(data), 997), *range(len(data) - 40, len(data) + 1)]
    found = {cut: (outcome(fast(PLAIN), data[:cut]), outcome(PLAIN, data[:cut])) for cut in cuts}
    assert {cut: both for cut, both in found.items() if both[0] != both[1]} == {}
    assert {both[0] for both in found.values()} == {"200 x 160", "unreadable_image"}


# --- where it goes ---


@pytest.fixture(scope="module")
def quick(clip_folder) -> ClipScorer:
    return ClipScorer(clip_folder, device="cpu", fast_decode=True)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Photos that are reduced, one that is too small for it, one PNG, and one that is cut."""
    samples = [
        {"jpg": encoded(photo(seed, (150 + seed, 131)), quality=90), "txt": b"photo %d" % seed} for seed in range(6)
    ]
    samples += [
        {"jpg": encoded(photo(6)), "txt": b"small"},
        {"png": encoded(photo(7, (200, 150)), "PNG"), "txt": b"png"},
        {"jpg": encoded(photo(8, (150, 150)))[:-200], "txt": b"cut"},
    ]
    return write_shard(tmp_path_factory.mktemp("fast") / "0.tar", samples)


def image_size(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.size)


def test_tables_hold_the_size_as_stored_and_the_scores_of_the_fast_pixels(quick, scorer, shard, tmp_path):
    tables = {}
    for name, model in (("fast", quick), ("plain", scorer)):
        process_shards(ScoreConfig(shards=shard, output=tmp_path / name, num_workers=0), model)
        tables[name] = ShardScores.read(tmp_path / name / "0.parquet")
    for column in ("key", "reason", "width", "height"):
        assert tables["fast"].table[column].equals(tables["plain"].table[column])
    assert tables["fast"].table["width"].to_pylist() == [*range(150, 156), 48, 200, 0]
    differing = tables["fast"].scores != tables["plain"].scores
    assert differing.tolist() == [True] * 6 + [False] * 3
    assert tables["fast"].metadata.fingerprint["fast_decode"] is True
    assert tables["plain"].metadata.fingerprint["fast_decode"] is False


def test_training_gets_whole_images_and_clips_view_is_that_of_the_table(quick, shard, tmp_path):
    process_shards(ScoreConfig(shards=shard, output=tmp_path, num_workers=0), quick)
    whole = [[150 + seed, 131] for seed in range(6)] + [[48, 40], [200, 150]]
    for image_transform in (None, image_size):
        inline, known = (
            next(iter(ClipFilterLoader(ClipWebDataset(shard, preprocess, image_transform=image_transform), by, **keep)))
            for keep in [{"threshold": None, "batch_size": 8}]
            for preprocess, by in ((quick.preprocess, quick), (None, ScoreFolder(tmp_path)))
        )
        assert torch.equal(inline["image"], known["image"])
        if image_transform is not None:
            assert inline["image"].tolist() == whole
        else:
            rgb = fast(quick.preprocess.view).decode(encoded(photo(0, (150, 131)), quality=90))
            assert rgb.scale == 4
            assert torch.equal(inline["image"][0], quick.preprocess.view(rgb))


def test_a_run_that_was_begun_with_the_other_value_is_refused(quick, scorer, shard, tmp_path, clip_folder, capsys):
    process_shards(ScoreConfig(shards=shard, output=tmp_path, num_workers=0), scorer)
    options = ["--output", str(tmp_path), "--model", str(clip_folder), "--num_workers", "0", "--device", "cpu"]
    with pytest.raises(SystemExit) as exited:
        main(["score", str(shard), *options, "--fast_decode", "true"])
    assert exited.value.code == 2
    assert "fast_decode false there, true here" in " ".join(capsys.readouterr().err.split())


def test_a_record_and_a_position_are_of_one_value_only(quick, scorer, shard, tmp_path):
    def loader(model, **options):
        return ClipFilterLoader(ClipWebDataset(shard, model.preprocess), model, threshold=None, **options)

    for _ in (recorded := loader(quick, record=tmp_path)):
        pass
    with pytest.raises(ValueError, match="fast_decode true there, false here"):
        loader(scorer, record=tmp_path)
    with pytest.raises(ValueError, match="fast_decode"):
        loader(scorer).load_state_dict(recorded.state_dict())


def test_an_image_that_comes_decoded_is_taken_as_it_is(quick, scorer):
    image = photo(1, (200, 160))
    fast_pixels, pixels = (model.preprocess.view(RgbImage.of(image)) for model in (quick, scorer))
    assert torch.equal(fast_pixels, pixels)
