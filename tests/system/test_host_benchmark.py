"""The host benchmark counts every thread and process, its stubbed model decides, and a short run of it adds up."""

import json
import multiprocessing
import resource
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.clocks import COPYING, DECODING, OTHER, Clocks
from benchmarks.material import make_data, make_model, make_shard
from benchmarks.stub import THRESHOLD, stub_scorer
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.shards.samples import SampleLayout, read_part, read_samples
from clipfilter_wds.shards.split import ShardPart
from tests.support.processes import in_fresh_process

USES = {"rewrite 30%", "score", "inline uint8 100%", "inline uint8 30%", "inline float32 100%", "inline float32 30%"}
USES |= {f"{use} resized on device" for use in ("rewrite 30%", "score", "inline float32 30%")}


def run(folder: Path, *args: str) -> list[dict]:
    args = [
        "host",
        "--quick=true",
        "--rounds=1",
        "--device=cpu",
        f"--output={folder}",
        f"--cache={folder}/cache",
        *args,
    ]
    in_fresh_process(_main, args, timeout=800)
    return json.loads((folder / "results.json").read_text())["host"]


def _main(args: list[str]) -> None:
    from benchmarks.run import main

    main(args)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_short_run_measures_all_uses_and_what_it_reports_adds_up(tmp_path):
    records = {record["name"].partition(",")[0]: record for record in run(tmp_path)}
    assert records.keys() == USES | {"from_scores 30%"}
    for use, record in records.items():
        parent, worker, copying = record["parent_us"], record["worker_us"], record["copying_us"]
        assert sum(record["threads"].values()) == pytest.approx(parent, abs=1)
        assert record["samples_per_second_16_cores"] == pytest.approx(1e6 / max(parent, (worker + copying) / 15))
        assert record["bare_us"] > record["bare"]["bare decode"] > 0
        assert {record["mode"], record["image_size"], record["batch_size"]} == {use.split()[0], 64, 8}
        if use in USES:
            assert worker > 100
            assert {"tar", "decode", "resize", "tokens", "build", "rest"} <= record["stages"].keys()
            assert sum(record["stages"].values()) == pytest.approx(worker)
        else:
            assert copying > 10
            assert worker == 0
    assert "view" in records["inline float32 30%"]["stages"]
    assert all(("training_thread_us" in record) == (record["mode"] == "inline") for record in records.values())


def spin(seconds: float) -> float:
    """Use so much CPU time, in this thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
    return time.thread_time()


class Spinning(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return spin(0.2)


class Copies(Spinning):
    pass


def _read_clocks() -> tuple[dict, dict, float, float]:
    multiprocessing.set_start_method("fork", force=True)
    clocks = Clocks()
    before = clocks.read()
    ended = threading.Thread(target=spin, args=(0.2,), name="clipfilter-writer")
    ended.start()
    ended.join()
    waiting, done = threading.Event(), threading.Event()
    alive = threading.Thread(
        target=lambda: (spin(0.1), waiting.set(), done.wait()), name="clipfilter-scorer", daemon=True
    )
    alive.start()
    waiting.wait()
    for dataset in (Spinning(), Copies()):
        list(DataLoader(dataset, num_workers=1))
    process = multiprocessing.Process(target=spin, args=(0.1,))
    process.start()
    process.join()
    spent = clocks.read() - before
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    done.set()
    return spent, before, own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def test_all_threads_and_processes_are_counted_whether_they_have_ended_or_not():
    spent, before, own, children = in_fresh_process(_read_clocks)
    assert 0.2 <= spent.threads["writer"] < 0.4
    assert 0.1 <= spent.threads["scorer"] < 0.3
    assert sum(spent.threads.values()) + sum(before.threads.values()) == pytest.approx(own, abs=0.02)
    assert spent.children[DECODING] >= 0.2
    assert spent.children[COPYING] >= 0.2
    assert spent.children[OTHER] >= 0.1
    assert sum(spent.children.values()) == pytest.approx(children, abs=0.001)


@pytest.mark.parametrize("kept", [0.3, 1.0])
def test_stubbed_model_keeps_its_share_whatever_is_scored_together(tmp_path, kept):
    scorer = stub_scorer(make_model(tmp_path, "tiny-224"), device="cpu", kept=kept)
    captions = [[caption] for _, caption in make_data(tmp_path, num_samples=1000, image_size=16).rows]
    ids, pixels = scorer.preprocess.tokenize(captions).input_ids, torch.zeros(1000, 3, 1, 1, dtype=torch.uint8)
    batches = zip(pixels.split(64), ids.split(64), strict=True)
    scores = [scores for _, scores in Recheck(scorer, THRESHOLD).map(batches, lambda batch: batch, lambda *_: None)]
    together = np.concatenate([batch.scores for batch in scores])
    assert (together >= THRESHOLD).mean() == pytest.approx(kept, abs=0.04)
    assert np.array_equal(together, scorer(pixels, ids).numpy())
    assert sum(batch.num_rechecked for batch in scores) <= 64  # of the batches that the error is measured on


def test_shard_has_the_pairs_of_the_other_benchmarks_and_json_beside_them(tmp_path):
    data = make_data(tmp_path, num_samples=5, image_size=16)
    shard = make_shard(tmp_path, num_samples=5, image_size=16)
    *samples, end = read_part(ShardPart(str(shard)), partial(read_samples, layout=SampleLayout()))
    assert end.num_samples == 5
    members = [{member.extension: member.data for member in sample.members} for sample in samples]
    assert [(each["jpg"], each["txt"].decode()) for each in members] == [
        (image.read_bytes(), caption) for image, caption in data.rows
    ]
    assert all(len(json.loads(each["json"])["uid"]) == 32 for each in members)
