"""A batch that gets lost on its way ends every run with an error; a worker that is stopped for a while ends none."""

import multiprocessing.connection
import os
import signal
import subprocess
import sys

import pytest
from torch.utils.data import get_worker_info

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.tables.config import TableConfig
from clipfilter_wds.tables.run import process_table
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.workers import pool
from clipfilter_wds.workers.crashes import LostBatchError
from clipfilter_wds.workers.transport import Message
from tests.support.toys import encoded, pair, photo, write_shard

NUM_SAMPLES = 24
OPTIONS = {"batch_size": 4, "num_workers": 1, "threshold": 0.0}


@pytest.fixture
def folder(tmp_path):
    """A shard, and a table of as many pairs."""
    write_shard(tmp_path / "in" / "0.tar", [pair(number) for number in range(NUM_SAMPLES)])
    (tmp_path / "0.jpg").write_bytes(encoded(photo(0)))
    (tmp_path / "in.csv").write_text("\n".join(["images,text", *(f"0.jpg,number {n}" for n in range(NUM_SAMPLES))]))
    return tmp_path


def score(folder, scorer) -> int:
    config = ScoreConfig(shards=folder / "in" / "0.tar", output=folder / "out", batch_size=4, num_workers=1)
    return process_shards(config, scorer).counts.seen


def rewrite(folder, scorer) -> int:
    return process_shards(
        RewriteConfig(shards=folder / "in" / "0.tar", output=folder / "out", **OPTIONS), scorer
    ).counts.kept


def load(folder, scorer) -> int:
    dataset = ClipWebDataset(folder / "in" / "0.tar", scorer.preprocess)
    return sum(len(batch["image"]) for batch in ClipFilterLoader(dataset, scorer, score_batch_size=4, **OPTIONS))


def filter_table(folder, scorer) -> int:
    config = TableConfig(
        input=folder / "in.csv", output=folder / "out.csv", image_key="images", caption_key="text", **OPTIONS
    )
    return process_table(config, lambda: scorer).counts.kept


each_use = pytest.mark.parametrize("use", [score, rewrite, load, filter_table])


@pytest.fixture
def harm_at_third(monkeypatch):
    """Let something happen to the third message of each worker, which is forked, instead of sending it at once."""
    send, sent = multiprocessing.connection.Connection._send_bytes, []

    def install(harm):
        def send_or_harm(connection, data):
            if get_worker_info() is not None and Message.__name__.encode() in bytes(data):
                sent.append(1)
                if len(sent) == 3:
                    return harm(lambda: send(connection, data))
            return send(connection, data)

        monkeypatch.setattr(multiprocessing.connection.Connection, "_send_bytes", send_or_harm)

    return install


@each_use
def test_a_lost_batch_is_an_error_and_no_endless_wait(folder, scorer, monkeypatch, harm_at_third, use):
    monkeypatch.setattr(pool, "_LOST_SECONDS", 2.0)
    harm_at_third(lambda send: None)
    with pytest.raises(LostBatchError, match="a batch of worker process 0 was lost on its way"):
        use(folder, scorer)


def stop_for_a_second(send) -> None:
    continue_later = f"import os, signal, time; time.sleep(1); os.kill({os.getpid()}, signal.SIGCONT)"
    subprocess.Popen([sys.executable, "-c", continue_later])
    os.kill(os.getpid(), signal.SIGSTOP)
    send()


@each_use
def test_a_worker_that_is_stopped_and_continued_costs_nothing(folder, scorer, harm_at_third, use):
    harm_at_third(stop_for_a_second)
    assert use(folder, scorer) == NUM_SAMPLES
