"""Workers that die are started again; a loader yields all but what killed them in the same order."""

import time
from functools import partial

import psutil
import pytest
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.types import DropReason
from clipfilter_wds.workers.crashes import CrashTracker, Quarantine, SampleRef, WorkerDiedError
from clipfilter_wds.workers.pool import worker_loader
from clipfilter_wds.workers.restart import restarting
from tests.support.evil import loop, segfault
from tests.support.restore import NUMBERS, Recipe, image_number, keys, load_scorer, text_number, write_numbered


class Counting(IterableDataset):
    """Yields numbers from a start on; one of them kills its worker unless that is left out."""

    def __init__(self, tracker: CrashTracker, start: int) -> None:
        self.tracker, self.start = tracker, start

    def __iter__(self):
        worker_tracker = self.tracker.for_worker()
        for number in range(self.start, 10):
            with worker_tracker.at("a.tar", number):
                if number == 6 and not worker_tracker.is_left_out("a.tar", number):
                    segfault()
            yield number


def counted(quarantine: Quarantine, starts: list[int]) -> list[int]:
    """What comes; ``starts`` tells where workers were started."""
    come: list[int] = []

    def start(tracker: CrashTracker):
        starts.append(len(come))
        return worker_loader(Counting(tracker, len(come)), num_workers=1, tracker=tracker)

    for number in restarting(start, ["a.tar"], num_workers=1, worker_timeout=0.0, quarantine=quarantine):
        come.append(number)
    return come


def test_workers_are_started_again_behind_what_has_come_and_what_they_died_of_is_known_to_later_ones():
    quarantine, starts = Quarantine(), []
    assert counted(quarantine, starts) == list(range(10))
    assert len(starts) == 3
    assert starts[0] == 0
    assert quarantine.left_out == {SampleRef("a.tar", 6)}
    again: list[int] = []
    assert counted(quarantine, again) == list(range(10))
    assert again == [0]


def test_the_first_death_is_an_error_where_none_is_put_up_with():
    starts: list[int] = []
    with pytest.raises(WorkerDiedError, match=r"SIGSEGV\) at sample 6 of "):
        counted(Quarantine(0), starts)
    assert starts == [0]


# --- inline ---

EVIL_NUMBERS = {1005, 3000}


def kill_at(harm, image: Image.Image):
    """A training transform that does harm to the worker that it runs in."""
    number = int(image_number(image))
    if number in EVIL_NUMBERS and get_worker_info():
        harm()
    return number


@pytest.fixture(scope="module")
def deadly(clip_folder, tmp_path_factory) -> Recipe:
    """A loader whose transform kills workers at two of the samples."""
    return Recipe(
        clip=clip_folder,
        shards=write_numbered(tmp_path_factory.mktemp("loader"), NUMBERS),
        dataset={"image_transform": partial(kill_at, segfault), "text_transform": text_number, "seed": 1},
        loader={"threshold": None, "batch_size": 5, "score_batch_size": 4, "num_workers": 2},
    )


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def without_evil(epochs: list[list[list[str]]]) -> list[list[str]]:
    return [[key for batch in epoch for key in batch if int(key) not in EVIL_NUMBERS] for epoch in epochs]


@pytest.mark.parametrize(
    ("shuffle", "options"),
    [
        (10, {}),
        pytest.param(0, {}, marks=pytest.mark.slow),
        pytest.param(10, {"persistent_workers": True}, marks=pytest.mark.slow),
        pytest.param(10, {"multiprocessing_context": "forkserver"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_loader_continues_without_what_kills_and_yields_all_else_in_the_same_order(deadly, caplog, shuffle, options):
    recipe = deadly.but(**options).but_dataset(shuffle=shuffle)
    harmless = recipe.but_dataset(image_transform=image_number)
    expected = without_evil(keys(harmless.build(), 2))
    loader = recipe.build()
    found = keys(loader, 2)
    assert [[key for batch in epoch for key in batch] for epoch in found] == expected
    assert (loader.stats.seen, loader.stats.dropped) == (96, {DropReason.DECODER_CRASH: 4})
    # The second epoch knows what the first one has learned.
    assert len([record for record in caplog.records if "died" in record.getMessage()]) == 4


def test_a_loader_raises_an_error_that_names_the_sample_when_told(deadly):
    loader = deadly.but(on_crash="raise").build()
    with pytest.raises(WorkerDiedError, match=r"SIGSEGV\) at sample 5 of '.*/00001.tar'"):
        keys(loader)


def test_a_transform_that_never_ends_is_found_out(deadly):
    began = time.monotonic()
    keys(deadly.but_dataset(image_transform=image_number).build())
    timeout = max(0.3, time.monotonic() - began)  # of one sample; all of them took no longer, on a busy machine too
    recipe = deadly.but(on_crash="raise", worker_timeout=timeout).but_dataset(image_transform=partial(kill_at, loop))
    with pytest.raises(WorkerDiedError, match=r"it took longer than worker_timeout\) at sample 5 of"):
        keys(recipe.build())


def test_a_death_never_surfaces_in_the_middle_of_the_training_step(deadly):
    """torch's own handler raises in whatever line the main thread is when a worker dies."""
    loader, before = deadly.build(), psutil.Process().children()
    for number, _ in enumerate(loader):
        if number == 0:  # a long step, in which the worker that reads ahead dies
            workers = [child for child in psutil.Process().children() if child not in before]
            assert len(workers) == 2
            while not any(map(has_ended, workers)):
                time.sleep(0.01)
    assert loader.stats.dropped == {DropReason.DECODER_CRASH: 2}


def test_a_state_from_after_a_crash_resumes_with_the_same_batches(deadly):
    loader = deadly.but_dataset(shuffle=10).build()
    iterator = iter(loader)
    for _ in range(7):
        next(iterator)
    state = loader.state_dict()
    rest = [batch["__key__"] for batch in iterator]
    resumed = deadly.but_dataset(shuffle=10).build()
    resumed.load_state_dict(state)
    assert keys(resumed) == [rest]
    assert resumed.stats == loader.stats


def test_a_record_is_whole_after_a_crash_and_the_sample_that_killed_is_not_tried_again(deadly, tmp_path, caplog):
    recipe = deadly.but(record=tmp_path / "record").but_dataset(shuffle=10)
    plain = keys(deadly.but_dataset(shuffle=10).build(), 2)
    caplog.clear()
    assert keys(recipe.build(), 2) == plain
    assert len([record for record in caplog.records if "died" in record.getMessage()]) == 4
    found = {
        (url.rpartition("/")[2], number): reason
        for url in expand_shards(recipe.shards)
        for number, reason in enumerate(ScoreFolder(tmp_path / "record").read(url).table["reason"].to_pylist())
    }
    assert len(found) == 48
    assert {place: reason for place, reason in found.items() if reason} == {
        ("00001.tar", 5): "decoder_crash",
        ("00003.tar", 0): "decoder_crash",
    }
    caplog.clear()
    assert keys(recipe.build(), 2) == plain
    assert keys(deadly.from_table(tmp_path / "record").but_dataset(shuffle=10).build(), 2) == plain
    assert "died" not in caplog.text


def test_a_loader_with_a_table_continues_without_what_kills(deadly, tmp_path):
    recipe = deadly.but_dataset(shuffle=10)
    process_shards(ScoreConfig(shards=recipe.shards, output=tmp_path, num_workers=0), load_scorer(recipe.clip))
    loader = recipe.from_table(tmp_path).build()
    assert keys(loader) == keys(recipe.build())
    assert (loader.stats.seen, loader.stats.dropped) == (48, {DropReason.DECODER_CRASH: 2})


@pytest.mark.parametrize("on_crash", ["ignore", None])
def test_an_unknown_way_to_take_a_crash_is_refused(deadly, on_crash):
    with pytest.raises(ValueError, match=r"on_crash is .*; use 'skip' or 'raise'"):
        deadly.build(on_crash=on_crash)
