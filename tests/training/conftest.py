import pytest

from tests.support.fitting import THRESHOLD, write_fit_shards
from tests.support.restore import (
    NUMBERS,
    Recipe,
    image_number,
    score_by_key,
    text_number,
    threshold_that_keeps,
    write_numbered,
)


@pytest.fixture(scope="module")
def all_samples(clip_folder, tmp_path_factory) -> Recipe:
    """A loader that keeps everything, in order."""
    return Recipe(
        clip=clip_folder,
        shards=write_numbered(tmp_path_factory.mktemp("loader"), NUMBERS),
        dataset={"image_transform": image_number, "text_transform": text_number, "seed": 1},
        loader={"threshold": None, "batch_size": 5, "score_batch_size": 4},
    )


@pytest.fixture(scope="module")
def scores(all_samples) -> dict[str, float]:
    return score_by_key(all_samples)


@pytest.fixture(scope="module")
def half(all_samples, scores) -> Recipe:
    """A loader that keeps half of the samples, in order."""
    return all_samples.but(threshold=threshold_that_keeps(0.5, scores))


# --- for Trainers ---


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    write_fit_shards(folder)
    return folder


@pytest.fixture
def data(shards, clip_folder):
    """Options of a data module that gives some six batches an epoch."""
    return {
        "train": f"{shards}/*.tar",
        "val": f"{shards}/0.tar",
        "model": str(clip_folder),
        "threshold": THRESHOLD,
        "batch_size": 8,
        "score_batch_size": 6,
        "shuffle": 15,
    }
