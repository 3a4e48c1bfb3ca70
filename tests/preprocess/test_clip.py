import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from webdataset.filters import default_collation_fn

from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.shards.samples import IMAGE_EXTENSIONS, SampleLayout
from clipfilter_wds.types import DropReason, Member, Sample
from tests.support.images import VIEW, png_header, reason_of
from tests.support.toys import encoded, pair, photo


def sample(problem: DropReason | None = None, **members: bytes) -> Sample:
    files = tuple(Member(name=f"0.{ext}", extension=ext, data=data) for ext, data in members.items())
    return Sample(key="0", index=0, members=files, problem=problem)


GOOD, TEXT = encoded(photo(1)), b"a photo"
# Its pixels are not there: had they been looked for, it would be unreadable.
BOMB = png_header(100_000, 100_000)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (sample(DropReason.TORN), DropReason.TORN),
        (sample(DropReason.MEMBER_TOO_LARGE), DropReason.MEMBER_TOO_LARGE),
        (sample(), DropReason.MISSING_IMAGE),
        (sample(txt=TEXT), DropReason.MISSING_IMAGE),
        (sample(txt=b"", json=b"{}"), DropReason.MISSING_IMAGE),
        (sample(npy=GOOD, txt=TEXT), DropReason.MISSING_IMAGE),
        (sample(jpg=GOOD), DropReason.MISSING_CAPTION),
        (sample(jpg=b"no image"), DropReason.MISSING_CAPTION),
        (sample(jpg=GOOD, json=b'{"caption": "a photo"}'), DropReason.MISSING_CAPTION),
        (sample(jpg=GOOD, txt=b""), DropReason.BLANK_CAPTION),
        (sample(jpg=GOOD, txt=" \t\r\n\u3000\u00a0".encode()), DropReason.BLANK_CAPTION),
        (sample(jpg=b"no image", txt=b" "), DropReason.BLANK_CAPTION),
        (sample(png=BOMB, txt=b" "), DropReason.BLANK_CAPTION),
        (sample(jpg=b"no image", txt=TEXT), DropReason.UNREADABLE_IMAGE),
        (sample(png=BOMB, txt=TEXT), DropReason.IMAGE_TOO_LARGE),
        (sample(jpg=b"no image", png=encoded(photo(1), "PNG"), txt=TEXT), DropReason.UNREADABLE_IMAGE),
    ],
)
def test_a_sample_that_can_not_be_used_has_one_reason(scorer, sample, reason):
    assert reason_of(scorer.preprocess.open_sample, sample, SampleLayout()) is reason


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_a_usable_sample_is_opened_whatever_the_extension_says_of_the_format(scorer, extension):
    opened = scorer.preprocess.open_sample(sample(txt=TEXT, **{extension: GOOD}), SampleLayout())
    assert torch.equal(opened.pixels, scorer.preprocess.view(VIEW.decode(GOOD)))
    assert opened[1:] == (["a photo"], 48, 40)


def test_the_best_image_extension_is_looked_at(scorer):
    members = {
        extension: encoded(photo(number, (40 + number, 40))) for number, extension in enumerate(IMAGE_EXTENSIONS)
    }
    for number in range(len(IMAGE_EXTENSIONS)):
        opened = scorer.preprocess.open_sample(sample(txt=TEXT, **members), SampleLayout())
        assert opened.width == 40 + number
        del members[IMAGE_EXTENSIONS[number]]


def opened_pairs(preprocess, executor=None) -> list[tuple]:
    samples = [sample(**pair(seed)) for seed in range(24)]
    run = executor.map if executor else map
    opened = list(run(lambda one: preprocess.open_sample(one, SampleLayout()), samples))
    tokens = list(run(lambda one: preprocess.tokenize([one.captions]).input_ids.tolist(), opened))
    return [(one.pixels.numpy().tobytes(), one[1:], ids) for one, ids in zip(opened, tokens, strict=True)]


def test_a_pickled_preprocess_does_the_same_and_has_the_same_fingerprint(scorer):
    expected = opened_pairs(scorer.preprocess)
    copy = pickle.loads(pickle.dumps(scorer.preprocess))
    assert opened_pairs(copy) == expected
    assert copy.fingerprint == scorer.preprocess.fingerprint == json.loads(json.dumps(copy.fingerprint))


def test_threads_give_what_one_thread_gives(scorer):
    with ThreadPoolExecutor(4) as executor:
        assert opened_pairs(scorer.preprocess, executor) == opened_pairs(scorer.preprocess)


@pytest.mark.parametrize(
    "change",
    [
        {"resize": 33},
        {"crop": (32, 31)},
        {"interpolation": "bilinear"},
        {"max_pixels": 10},
        {"resampler": "pillow"},
        {"fast_decode": True},
    ],
    ids=str,
)
def test_the_fingerprint_tells_every_setting_of_the_view(scorer, change):
    settings = {"resize": 32, "crop": (32, 32), **change}
    preprocess = type(scorer.preprocess)(view=ImageView(**settings), tokenize=scorer.preprocess.tokenize)
    differing = {name for name, value in preprocess.fingerprint.items() if value != scorer.preprocess.fingerprint[name]}
    assert differing == set(change)


# --- a stage of a pipeline ---


@pytest.fixture
def odd_samples():
    """Samples as webdataset gives them, encoded and decoded; of the first two, image and caption can be used."""
    good = pair(1)
    return [
        {"__key__": "0", "__url__": "a.tar", **good, "cls": b"3"},
        {"__key__": "1", "__url__": "a.tar", "png": photo(1), "txt": "a caption", "json": {"caption": "another"}},
        {"__key__": "2", "__url__": "a.tar", "jpg": good["jpg"]},
        {"__key__": "3", "__url__": "a.tar", "txt": "a caption"},
        {"__key__": "4", "__url__": "a.tar", "json": {}},
        {"__key__": "5", "__url__": "a.tar", "jpg": b"no image", "txt": b"a caption"},
        {"__key__": "6", "__url__": "a.tar", "jpg": photo(1), "txt": " "},
    ]


def test_whatever_a_sample_has_the_stage_gives_what_webdataset_collates(scorer, odd_samples):
    samples = [scorer.preprocess(sample, columns=["cls"]) for sample in odd_samples]
    batch = default_collation_fn(samples)
    assert batch["pixel_values"].shape == (7, 3, 32, 32)
    assert batch["input_ids"].shape == (7, 77)
    assert batch["__key__"] == [str(number) for number in range(7)]
    assert list(batch["cls"]) == [3, *[None] * 6]
    assert batch["text"] == ["photo number 1", "a caption", "", "", "", "", ""]
    assert [image.size for image in batch["image"]] == [(48, 40), (48, 40), *[(32, 32)] * 5]
    reasons = ["", "", "missing_caption", "missing_image", "missing_image", "unreadable_image", "blank_caption"]
    assert batch["reason"] == reasons


def test_the_stage_gives_training_the_image_that_it_decoded(scorer):
    stored = photo(3, (400, 300))
    for model in (scorer.preprocess, scorer.preprocess.with_view(fast_decode=True)):
        image = model({"jpg": encoded(stored), "txt": b"a caption"})["image"]
        assert image.tobytes() == Image.open(io.BytesIO(encoded(stored))).convert("RGB").tobytes()


def test_the_stage_prepares_what_the_offline_commands_prepare(scorer):
    opened = scorer.preprocess.open_sample(sample(**pair(1)), SampleLayout())
    pixels, tokens = scorer.preprocess.collate([opened])
    for prepared in (scorer.preprocess(pair(1)), scorer.preprocess.pair(pair(1)["jpg"], "photo number 1")):
        assert torch.equal(prepared["pixel_values"], pixels[0])
        assert torch.equal(prepared["input_ids"][: tokens.input_ids.shape[1]], tokens.input_ids[0])


def test_columns_under_other_names_are_an_error_that_lists_them(scorer):
    renamed = {"__key__": "0", "image": photo(1), "caption": "a caption"}
    with pytest.raises(ValueError, match=r"columns \['image', 'caption'\], no image \(jpg, .* scorer.preprocess.pair"):
        scorer.preprocess(renamed)
    with pytest.raises(ValueError, match=r"no image \(picture\) and no caption \(text\)"):
        scorer.preprocess({"jpg": b"", "txt": "a caption"}, SampleLayout(image="picture", caption="text"))


def test_an_image_that_is_a_tensor_already_is_an_error(scorer):
    with pytest.raises(TypeError, match=r"the image is a Tensor; .* before what makes tensors of images"):
        scorer.preprocess({"jpg": torch.zeros(3, 40, 48), "txt": "a caption"})


# --- a pair ---


@pytest.mark.parametrize(
    ("image", "caption", "reason"),
    [
        (GOOD, "a caption", ""),
        (photo(1), ["one", " ", "two"], ""),
        ({"bytes": GOOD, "path": None}, "half a pair: \ud83d", ""),
        ({"bytes": None, "path": None}, "a caption", "missing_image"),
        ({"bytes": None, "path": "not_there.jpg"}, "a caption", "unreadable_image"),
        (None, "a caption", "missing_image"),
        (GOOD, None, "missing_caption"),
        (GOOD, [], "missing_caption"),
        (GOOD, "", "blank_caption"),
        (b"no image", "a caption", "unreadable_image"),
        (BOMB, "a caption", "image_too_large"),
        (Image.new("1", (1, 10_000_000)), "a caption", "image_too_large"),
    ],
)
def test_a_pair_of_any_kind_is_prepared_or_has_a_reason(scorer, image, caption, reason):
    prepared = scorer.preprocess.pair(image, caption)
    assert prepared["reason"] == reason
    assert prepared["pixel_values"].shape == (3, 32, 32)
    assert prepared["input_ids"].shape == ((2, 77) if isinstance(caption, list) and caption else (77,))


@pytest.mark.parametrize(
    ("caption", "texts"),
    [
        (["one", None, float("nan"), "two"], 2),
        (np.array(["one", "two"]), 2),
        (np.array(["one"], dtype=object), 1),
        (pd.Series(["one", None, "two"]), 2),
        (("one", 7), 1),
        ([None], 0),
        (np.array([]), 0),
        (float("nan"), 0),
        (pd.NA, 0),
    ],
)
def test_captions_of_a_column_are_its_texts(scorer, caption, texts):
    prepared = scorer.preprocess.pair(memoryview(GOOD), caption)
    assert prepared["reason"] == ("" if texts else "missing_caption")
    assert prepared["input_ids"].shape == ((texts, 77) if texts > 1 else (77,))


@pytest.mark.parametrize("caption", [{"en": "a caption"}, b"a caption", 7])
def test_what_is_no_caption_is_an_error_that_names_it(scorer, caption):
    with pytest.raises(TypeError, match=f"the caption is a {type(caption).__name__}; give a text, or a list of texts"):
        scorer.preprocess.pair(GOOD, caption)


def test_an_image_that_pillow_opened_and_can_not_read_has_a_reason(scorer):
    cut = Image.open(io.BytesIO(GOOD[:-200]))
    assert scorer.preprocess.pair(cut, "a caption")["reason"] == "unreadable_image"


def test_an_image_file_is_read_where_there_are_no_bytes_of_it(scorer, tmp_path):
    (tmp_path / "a.jpg").write_bytes(GOOD)
    stored = scorer.preprocess.pair({"bytes": None, "path": str(tmp_path / "a.jpg")}, "a caption")
    assert torch.equal(stored["pixel_values"], scorer.preprocess.pair(GOOD, "a caption")["pixel_values"])
