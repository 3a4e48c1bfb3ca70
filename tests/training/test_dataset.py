import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from clipfilter_wds.preprocess import image as preprocess
from clipfilter_wds.training.dataset import ClipWebDataset, StreamWorker
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.training.stream import Position, StreamProgress
from clipfilter_wds.types import DropReason
from clipfilter_wds.workers.pool import worker_loader
from clipfilter_wds.world import World
from tests.support.restore import image_number, numbered_pair, text_number, write_numbered
from tests.support.toys import pair, write_shard

NUMBERS = [[*range(100 * shard, 100 * shard + 7)] for shard in range(3)]
ALL_NUMBERS = [number for numbers in NUMBERS for number in numbers]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("dataset"), NUMBERS)


def batches(dataset, *, num_workers=0, context=None, batch_size=4, epoch=0, world=None):
    """One epoch, as the loader reads it."""
    topology = dataset.topology(world or World(), max(1, num_workers))
    streams = dict.fromkeys(topology.streams, StreamProgress(Position(epoch=epoch)))
    worker = StreamWorker(dataset, topology, streams, batch_size=batch_size, epoch=epoch)
    return list(worker_loader(worker, num_workers=num_workers, multiprocessing_context=context))


def to_vector(image):
    return {"pixels": torch.tensor(image.size), "number": image_number(image)}


def test_one_decode_makes_the_view_for_clip_and_the_view_for_training(scorer, shards, monkeypatch):
    opened = []
    original = preprocess.ImageView.decode
    monkeypatch.setattr(preprocess.ImageView, "decode", lambda view, data: opened.append(data) or original(view, data))
    dataset = ClipWebDataset(shards, scorer.preprocess, image_transform=image_number)
    read = batches(dataset)
    assert len(opened) == len(set(opened)) == 21
    assert torch.cat([batch.views["image"] for batch in read if len(batch.rows)]).tolist() == ALL_NUMBERS


def test_the_scorer_is_not_taken_for_its_preprocess(scorer, shards):
    with pytest.raises(TypeError, match="preprocess is of type ClipScorer; give a scorer's `preprocess`"):
        ClipWebDataset(shards, scorer)


def test_an_image_transform_does_not_change_what_clip_sees(scorer, shards):
    plain = batches(ClipWebDataset(shards, scorer.preprocess))

    def blacken(image):
        view = image_number(image)
        image.paste((0, 0, 0), (0, 0, *image.size))  # in place
        return view

    changed = batches(ClipWebDataset(shards, scorer.preprocess, image_transform=blacken))
    for one, other in zip(plain, changed, strict=True):
        assert torch.equal(one.prepared.pixel_values, other.prepared.pixel_values)
        assert torch.equal(one.prepared.input_ids, other.prepared.input_ids)


def test_without_transforms_training_gets_clips_view_and_the_caption(scorer, shards):
    first = batches(ClipWebDataset(shards, scorer.preprocess))[0]
    assert first.views["image"] is first.prepared.pixel_values
    assert first.prepared.pixel_values.dtype is torch.uint8
    assert first.prepared.pixel_values.shape == (4, 3, 32, 32)
    assert first.views["text"] == [f"photo number {number}" for number in range(4)]


@pytest.mark.parametrize("num_samples", [4, 100])  # piped, and in shared memory
def test_clips_views_are_sent_once_where_they_are_what_training_gets(scorer, tmp_path, num_samples):
    url = write_shard(tmp_path / "0.tar", [pair(number) for number in range(num_samples)])
    dataset = ClipWebDataset(url, scorer.preprocess)
    here, there = (batches(dataset, num_workers=number, batch_size=100)[0] for number in (0, 1))
    assert there.views["image"] is there.prepared.pixel_values
    assert torch.equal(there.views["image"], here.views["image"])
    assert there.rows == there.prepared.rows == here.rows


def test_views_of_any_shape_are_collated_row_by_row(scorer, shards):
    dataset = ClipWebDataset(shards, scorer.preprocess, image_transform=to_vector, text_transform=text_number)
    for batch in batches(dataset):
        numbers = [int(row.key) for row in batch.rows]
        if numbers:
            assert batch.views["image"]["number"].tolist() == batch.views["text"].tolist() == numbers
            assert batch.views["image"]["pixels"].tolist() == [[48, 40]] * len(numbers)


def test_torchvision_transforms_make_the_training_view(scorer, shards):
    augment = v2.Compose([v2.RandomResizedCrop(24), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    first = batches(ClipWebDataset(shards, scorer.preprocess, image_transform=augment), num_workers=1)[0]
    assert first.views["image"].shape == (4, 3, 24, 24)
    assert first.views["image"].dtype is torch.float32


def test_transforms_see_usable_samples_only_and_the_others_have_a_reason(scorer, tmp_path):
    good = numbered_pair(5)
    samples = [good, {"png": good["png"]}, {**good, "txt": b" "}, {**good, "png": b"\x89PNG"}, {"txt": b"x"}, good]
    url = write_shard(tmp_path / "mixed.tar", samples)
    dataset = ClipWebDataset(url, scorer.preprocess, image_transform=image_number, text_transform=text_number)
    (batch,) = batches(dataset, batch_size=10)
    reasons = [row.reason for row in batch.rows]
    assert reasons == [
        None,
        DropReason.MISSING_CAPTION,
        DropReason.BLANK_CAPTION,
        DropReason.UNREADABLE_IMAGE,
        DropReason.MISSING_IMAGE,
        None,
    ]
    assert batch.views["image"].tolist() == batch.views["text"].tolist() == [5, 5]
    assert len(batch.prepared.pixel_values) == len(batch.prepared.input_ids) == 2
    assert len(batch.url_of) == len(batch.rows) == 6


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_it_travels_to_workers_however_they_are_started(scorer, shards, context):
    options = {"image_transform": image_number, "text_transform": text_number, "shuffle": 5, "seed": 3}
    dataset = ClipWebDataset(shards, scorer.preprocess, **options)
    here = [row.key for batch in batches(dataset) for row in batch.rows]
    there = [row.key for batch in batches(dataset, num_workers=1, context=context) for row in batch.rows]
    assert there == here
    assert sorted(map(int, here)) == ALL_NUMBERS


def test_a_pickled_dataset_reads_the_same(scorer, shards):
    dataset = ClipWebDataset(shards, scorer.preprocess, image_transform=image_number, shuffle=5, seed=3)
    again = pickle.loads(pickle.dumps(dataset))
    for one, other in zip(batches(dataset), batches(again), strict=True):
        assert one.rows == other.rows
        assert torch.equal(one.prepared.pixel_values, other.prepared.pixel_values)


def test_workers_never_read_the_rank_from_the_environment(scorer, shards, monkeypatch):
    dataset = ClipWebDataset(shards, scorer.preprocess)
    expected = [row.key for batch in batches(dataset, num_workers=2) for row in batch.rows]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert [row.key for batch in batches(dataset, num_workers=2) for row in batch.rows] == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_it_works_in_a_plain_dataloader_and_follows_set_epoch(scorer, shards, num_workers):
    dataset = ClipWebDataset(shards, scorer.preprocess, shuffle=10, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        orders.append([row.key for batch in loader for row in batch.rows])
    assert sorted(map(int, orders[0])) == ALL_NUMBERS
    assert orders[0] == orders[2] != orders[1]


def test_a_transform_that_fails_is_an_error_and_no_drop(scorer, tmp_path):
    url = write_shard(tmp_path / "one.tar", [pair(1)])
    with pytest.raises(ZeroDivisionError):
        batches(ClipWebDataset(url, scorer.preprocess, image_transform=lambda image: 1 / 0))


class LockedText(str):
    """A text that can't be pickled."""

    def __reduce__(self):
        raise TypeError("cannot pickle this")


def lock_some(caption: str) -> str:
    return LockedText(caption) if caption.endswith("3") else caption


def test_a_view_that_can_not_be_pickled_names_its_sample(scorer, tmp_path):
    url = write_shard(tmp_path / "one.tar", [pair(number) for number in range(5)])
    dataset = ClipWebDataset(url, scorer.preprocess, text_transform=lock_some)
    loader = ClipFilterLoader(dataset, scorer, threshold=None, num_workers=1)
    with pytest.raises(TypeError, match=rf"cannot pickle this\n.*sample '000000003' of {url} has a view that can't be"):
        next(iter(loader))


def test_shards_that_are_not_there_are_an_error_or_left_out_with_a_warning(tmp_path, caplog):
    there = [str(write_shard(tmp_path / f"{number}.tar", [pair(number)])) for number in (0, 2)]
    with pytest.raises(ValueError, match=r"1\.tar': there is no such file; skip_missing_shards=True leaves out"):
        ClipWebDataset(f"{tmp_path}/{{0..19}}.tar")
    assert not caplog.records
    assert ClipWebDataset(f"{tmp_path}/{{0..19}}.tar", skip_missing_shards=True).urls == there
    [record] = caplog.records
    assert f"left out, as they are not there: {tmp_path}/1.tar, {tmp_path}/3.tar, " in record.message
    assert record.message.endswith("/11.tar and 8 others")


def test_bad_arguments_are_refused(scorer, shards, tmp_path):
    with pytest.raises(ValueError, match="shuffle is -1"):
        ClipWebDataset(shards, scorer.preprocess, shuffle=-1)
    with pytest.raises(ValueError, match="nothing"):
        ClipWebDataset(f"{tmp_path}/nothing-*.tar", scorer.preprocess)
    with pytest.raises(ValueError, match="pipe"):
        ClipWebDataset("pipe:cat x.tar", scorer.preprocess)
