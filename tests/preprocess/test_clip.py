import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

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
