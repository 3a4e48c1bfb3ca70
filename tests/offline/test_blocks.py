import http.server
import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from clipfilter_wds.offline.blocks import Block, BlockDataset
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.types import DropReason
from clipfilter_wds.workers.pool import worker_loader
from tests.support.pace import FOREVER
from tests.support.toys import encoded, pair, photo, write_shard, write_tar

# Samples per shard; one shard is empty and one is smaller than a batch.
SHARD_SIZES = [23, 0, 9, 40, 3]
BATCH_SIZE = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of different sizes with a few unusable samples in each."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, num_samples in enumerate(SHARD_SIZES):
        samples = [pair(100 * shard + number) for number in range(num_samples)]
        for number in range(0, num_samples, 5):
            samples[number] = {"jpg": b"no image", "txt": b"x"}
        for number in range(2, num_samples, 7):
            samples[number] = {"jpg": encoded(photo(number)), "json": b"{}"}
        write_shard(folder / f"{shard}.tar", samples)
    return [str(folder / f"{shard}.tar") for shard in range(len(SHARD_SIZES))]


def batches_of(urls, scorer, *, num_workers: int = 0, batch_size: int = BATCH_SIZE, **options) -> list[Block]:
    dataset = dataset_of(urls, scorer, batch_size=batch_size, **options)
    return list(worker_loader(dataset, num_workers=num_workers))


def dataset_of(shards, scorer, *, batch_size: int = BATCH_SIZE, allow_pipe: bool = False, **options) -> BlockDataset:
    urls = expand_shards(shards, allow_pipe=allow_pipe)
    return BlockDataset(
        urls=urls, preprocess=scorer.preprocess, batch_size=batch_size, allow_pipe=allow_pipe, **options
    )


def content(batch: Block) -> tuple:
    """All of a batch but for who read it."""
    return (
        batch.part.url,
        list(batch.prepared.rows),
        batch.prepared.pixel_values.tolist(),
        batch.prepared.input_ids.tolist(),
    )


def rows_of(batch):
    return list(batch.prepared.rows)


def with_rows(batches: list[Block]) -> list[tuple]:
    """The contents of the batches that hold samples, in the order of their shards and indices."""
    return sorted(
        (content(batch) for batch in batches if len(batch.prepared.rows)),
        key=lambda content: (content[0], content[1][0].index),
    )


@pytest.mark.parametrize("batch_size", [4, 100])
def test_a_block_comes_out_of_a_worker_as_it_is(scorer, tmp_path, batch_size):
    shard = write_shard(tmp_path / "0.tar", [pair(number) for number in range(100)])
    here = batches_of([str(shard)], scorer, batch_size=batch_size)
    there = batches_of([str(shard)], scorer, batch_size=batch_size, num_workers=1)
    assert with_rows(there) == with_rows(here)
    assert {block.prepared.pixel_values.dtype for block in there} == {torch.uint8}
    assert {block.prepared.input_ids.dtype for block in there} == {torch.int64}


@pytest.mark.parametrize("num_workers", [0, 1, 3, 8])
@pytest.mark.parametrize("num_shards", range(1, len(SHARD_SIZES) + 1))
def test_every_sample_is_read_exactly_once_by_any_number_of_workers(shards, scorer, num_shards, num_workers):
    batches = batches_of(shards[:num_shards], scorer, num_workers=num_workers)
    read = sorted((batch.part.url, row.index, row.key) for batch in batches for row in batch.prepared.rows)
    assert read == [
        (url, index, f"{index:09d}")
        for url, num_samples in zip(shards[:num_shards], SHARD_SIZES, strict=False)
        for index in range(num_samples)
    ]
    for url, num_samples in zip(shards[:num_shards], SHARD_SIZES, strict=False):
        last = [batch for batch in batches if batch.part.url == url and batch.end]
        assert {batch.end.num_samples for batch in last} == {num_samples}
        assert sorted(batch.part.part for batch in last) == list(range(last[0].part.num_parts))


@pytest.mark.parametrize("num_workers", [1, 3, 8])
@pytest.mark.parametrize("num_shards", [1, 2, len(SHARD_SIZES)])
def test_batches_hold_the_same_samples_for_any_number_of_workers(shards, scorer, num_shards, num_workers):
    alone = batches_of(shards[:num_shards], scorer)
    together = batches_of(shards[:num_shards], scorer, num_workers=num_workers)
    assert with_rows(together) == with_rows(alone)


def test_batches_hold_the_same_samples_whatever_other_shards_there_are(shards, scorer):
    for url in shards:
        alone = with_rows(batches_of([url], scorer))
        assert [content for content in with_rows(batches_of(shards, scorer)) if content[0] == url] == alone


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_a_batch_is_a_run_of_consecutive_samples_with_a_view_per_usable_one(shards, scorer, batch_size):
    for batch in batches_of(shards, scorer, batch_size=batch_size):
        indices = [row.index for row in batch.prepared.rows]
        assert indices == list(range(indices[0], indices[0] + len(indices))) if indices else batch.end
        assert len(indices) == batch_size or batch.end
        num_usable = sum(row.reason is None for row in batch.prepared.rows)
        assert batch.prepared.pixel_values.shape == (num_usable, 3, *scorer.preprocess.view.crop)
        assert batch.prepared.pixel_values.dtype == torch.uint8
        assert batch.prepared.input_ids.shape[0] == num_usable
        assert batch.prepared.input_ids.dtype == torch.int64


def test_rows_tell_reason_size_and_tokens(tmp_path, scorer):
    long = "word " * 300
    samples = [
        {"jpg": encoded(photo(0, (64, 50))), "txt": b"ab"},
        {"jpg": b"no image", "txt": b"ab"},
        {"jpg": encoded(photo(0)), "txt": b" "},
        {"txt": b"ab"},
        {"jpg": encoded(photo(0))},
        {"jpg": encoded(photo(0)), "txt": long.encode()},
    ]
    [batch] = batches_of(write_shard(tmp_path / "0.tar", samples), scorer, batch_size=100)
    assert [row.reason for row in batch.prepared.rows] == [
        None,
        DropReason.UNREADABLE_IMAGE,
        DropReason.BLANK_CAPTION,
        DropReason.MISSING_IMAGE,
        DropReason.MISSING_CAPTION,
        None,
    ]
    assert [(row.width, row.height) for row in batch.prepared.rows] == [(64, 50), *[(0, 0)] * 4, (48, 40)]
    assert [row.truncated for row in batch.prepared.rows] == [False] * 5 + [True]
    assert rows_of(batch)[0].num_tokens == 4
    assert rows_of(batch)[5].num_tokens > scorer.preprocess.tokenize.max_length
    views = [scorer.preprocess.view(scorer.preprocess.view.decode(samples[number]["jpg"])) for number in (0, 5)]
    assert torch.equal(batch.prepared.pixel_values, torch.stack(views))
    assert torch.equal(batch.prepared.input_ids, scorer.preprocess.tokenize(["ab", long]).input_ids)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_torn_shard_ends_with_a_torn_row(tmp_path, scorer, num_workers):
    path = write_shard(tmp_path / "0.tar", [pair(number) for number in range(10)])
    os.truncate(path, path.stat().st_size // 2)
    batches = batches_of(path, scorer, num_workers=num_workers)
    rows = sorted((row.index, row.reason) for batch in batches for row in batch.prepared.rows)
    [end] = {batch.end for batch in batches if batch.end}
    assert end.torn
    assert 0 < end.num_samples < 10
    assert rows == [
        (index, DropReason.TORN if index == end.num_samples - 1 else None) for index in range(end.num_samples)
    ]


def unsorted_shard(path):
    members = [(f"{key}.{ext}", data) for key in range(20) for ext, data in pair(key).items()]
    return write_tar(path, [*members, ("3.jpg", b"again")])


def garbage(path):
    path.write_bytes(b"<html>404</html>" * 1000)
    return path


@pytest.mark.parametrize(("make", "message"), [(unsorted_shard, "not sorted"), (garbage, "not a tar archive")])
@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_a_shard_that_can_not_be_used_is_a_batch_with_the_error_and_the_others_are_read(
    tmp_path, shards, scorer, make, message, num_workers
):
    bad = str(make(tmp_path / "bad.tar"))
    batches = batches_of([shards[0], bad, shards[3]], scorer, num_workers=num_workers)
    last = [batch for batch in batches if batch.part.url == bad and (batch.end or batch.error)]
    assert last
    assert sorted(batch.part.part for batch in last) == list(range(last[0].part.num_parts))
    assert all(message in batch.error and batch.end is None for batch in last)
    for url, num_samples in ((shards[0], SHARD_SIZES[0]), (shards[3], SHARD_SIZES[3])):
        assert sum(len(batch.prepared.rows) for batch in batches if batch.part.url == url) == num_samples
        assert not any(batch.error for batch in batches if batch.part.url == url)


def test_a_shard_that_vanishes_after_it_was_listed_is_a_batch_with_the_error(tmp_path, scorer):
    path = write_shard(tmp_path / "0.tar", [pair(0)])
    dataset = dataset_of(path, scorer)
    path.unlink()
    [batch] = worker_loader(dataset, num_workers=1)
    assert "no such file" in batch.error


def test_a_pipe_is_read_in_workers_when_it_is_allowed(tmp_path, scorer):
    path = write_shard(tmp_path / "0.tar", [pair(number) for number in range(6)])
    url = f"pipe:cat {path}"
    with pytest.raises(ValueError, match="allow_pipe=True"):
        dataset_of(url, scorer)
    batches = batches_of(url, scorer, num_workers=2, allow_pipe=True)
    assert sum(len(batch.prepared.rows) for batch in batches) == 6
    assert not any(batch.error for batch in batches)


def test_a_pipe_whose_command_fails_is_a_batch_with_the_error(scorer):
    batches = batches_of("pipe:exit 3", scorer, num_workers=1, allow_pipe=True)
    assert [batch.error is not None for batch in batches] == [True]


def test_workers_read_over_http_after_their_parent_has(tmp_path, shards, scorer):
    folder = shards[0].rpartition("/")[0]
    handler = partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            urls = [f"http://127.0.0.1:{server.server_port}/{shard}.tar" for shard in (0, 3)]
            batches = [batches_of(urls, scorer, num_workers=num_workers) for num_workers in (0, 2)]
        finally:
            server.shutdown()
            thread.join()
    assert not any(batch.error for batch in batches[0])
    assert with_rows(batches[1]) == with_rows(batches[0])


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_the_caption_is_read_from_where_the_layout_says(tmp_path, scorer):
    samples = [{"jpg": encoded(photo(0)), "json": b'{"caption": "abc"}', "txt": b" "}]
    path = write_shard(tmp_path / "0.tar", samples)
    [batch] = batches_of(path, scorer, layout=SampleLayout(caption="json:caption"))
    assert (rows_of(batch)[0].reason, rows_of(batch)[0].num_tokens) == (None, 5)
    [batch] = batches_of(path, scorer)
    assert rows_of(batch)[0].reason is DropReason.BLANK_CAPTION


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused_with_its_value(shards, scorer, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        dataset_of(shards, scorer, batch_size=batch_size)


def test_iterating_twice_gives_the_same_batches(shards, scorer):
    dataset = dataset_of(shards, scorer)
    assert [content(batch) for batch in dataset] == [content(batch) for batch in dataset]


def test_loading_batches_leaves_no_process_behind(shards, scorer):
    """Also when only the first batch is taken."""
    psutil = pytest.importorskip("psutil")
    dataset = dataset_of(shards, scorer)
    before = set(psutil.Process().children(recursive=True))
    batches = iter(worker_loader(dataset, num_workers=2))
    next(batches)
    workers = set(psutil.Process().children(recursive=True)) - before
    assert len(workers) >= 2
    del batches
    _, alive = psutil.wait_procs(workers, timeout=FOREVER)
    assert not alive


def test_a_spawned_process_can_be_handed_the_dataset(shards, scorer, tmp_path):
    """Where processes are spawned and not forked, the dataset is pickled."""
    dataset = dataset_of(shards[0], scorer)
    torch.save(dataset, tmp_path / "dataset.pt")
    code = (
        "import sys, torch\n"
        "dataset = torch.load(sys.argv[1], weights_only=False)\n"
        "print(sum(int(batch.prepared.pixel_values.sum()) for batch in dataset))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "dataset.pt"], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == sum(int(batch.prepared.pixel_values.sum()) for batch in dataset)
