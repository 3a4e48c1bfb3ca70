"""The rewrite on a real Ray: on this machine, and on a cluster of three nodes one of which goes."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from PIL import Image, PpmImagePlugin

from clipfilter_wds.cli import main
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.engines.ray import RayEngine
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.types import DropReason
from tests.support.evil import EvilImageFile, write_shards
from tests.support.outputs import bits, check_accounting
from tests.support.pace import FOREVER, Stopwatch
from tests.support.toys import make_clip, pair, write_shard

ray = pytest.importorskip("ray")


def call(command: str, shards: str, output, clip_folder, *more: object) -> int:
    options = ("--model", clip_folder, "--device", "cpu", "--batch_size", 8, "--engine", "ray")
    arguments = (command, shards, "--output", output, *options, *more)
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.parametrize(
    ("choice", "resizes"),
    [
        (("threshold", 0.12), False),
        pytest.param(("threshold", 0.12), True, marks=pytest.mark.slow),
        pytest.param(("keep_fraction", 0.3), False, marks=pytest.mark.slow),
    ],
    ids=["threshold", "resize_on_device", "keep_fraction"],
)
def test_ray_writes_what_one_process_writes_and_fails_the_shards_that_it_fails(clip_folder, tmp_path, choice, resizes):
    scorer = ClipScorer(clip_folder, device="cpu", resize_on_device=resizes)
    for shard in range(6):
        write_shard(tmp_path / "in" / f"{shard}.tar", [pair(100 * shard + i) for i in range(20)])
    (tmp_path / "in" / "garbage.tar").write_bytes(b"garbage" * 1000)
    shards = f"{tmp_path}/in/*.tar"
    options = {"batch_size": 8, "embeddings": "fp32", choice[0]: choice[1]}
    process_shards(RewriteConfig(shards=shards, output=tmp_path / "local", **options), scorer)
    more = ("--embeddings", "fp32", f"--{choice[0]}", choice[1], *["--resize_on_device"] * resizes)
    assert call("rewrite", shards, tmp_path / "out", clip_folder, *more) == 1
    assert not ray.is_initialized()  # what was started here is gone
    assert bits(tmp_path / "out") == bits(tmp_path / "local")
    summary, local = (check_accounting(tmp_path / name) for name in ("out", "local"))
    for name in ("seen", "kept", "dropped", "shards", "failed_shards", "model", "scored", "resumed_shards"):
        assert summary[name] == local[name], name
    assert "not a tar archive" in summary["failed_shards"][str(tmp_path / "in" / "garbage.tar")]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--cpus_per_task", 0), "cpus_per_task is 0"),
        (("--engine", "local", "--cpus_per_task", 2), "are for --engine ray"),
    ],
)
def test_unusable_options_are_refused(capsys, tmp_path, clip_folder, options, says):
    write_shard(tmp_path / "0.tar", [pair(1)])
    assert call("score", f"{tmp_path}/0.tar", tmp_path / "out", clip_folder, *options) == 2
    assert says in capsys.readouterr().err


def test_ranks_and_ray_do_not_go_together(capsys, monkeypatch, tmp_path, clip_folder):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_shard(tmp_path / "0.tar", [pair(1)])
    assert call("score", f"{tmp_path}/0.tar", tmp_path / "out", clip_folder) == 2
    assert "start the command once" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_completes_with_the_same_bits(scorer, clip_folder, tmp_path):
    from ray.cluster_utils import Cluster

    for shard in range(30):
        write_shard(tmp_path / "in" / f"{shard:02d}.tar", [pair(100 * shard + i, size=(300, 300)) for i in range(40)])
    options = {"shards": f"{tmp_path}/in/*.tar", "threshold": 0.12, "batch_size": 8}
    process_shards(RewriteConfig(output=tmp_path / "local", **options), scorer)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    removed = threading.Event()

    def remove_a_node_in_mid_run() -> None:
        while len(list((tmp_path / "out").glob("*_stats.json"))) < 6:
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)
        removed.set()

    remover = threading.Thread(target=remove_a_node_in_mid_run)
    try:
        remover.start()
        load = partial(ClipScorer, str(clip_folder), device="cpu")
        with RayEngine(load, address=cluster.address, use_gpus=False) as engine:
            tally = process_shards(RewriteConfig(output=tmp_path / "out", **options), engine)
        remover.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert removed.is_set()
    assert (tally.done, tally.failed) == (30, {})
    assert bits(tmp_path / "out") == bits(tmp_path / "local")
    check_accounting(tmp_path / "out")


def load_beside_evil(clip_folder, tries) -> ClipScorer:
    """A model, in a process whose workers decode PPM with a plug-in that kills them."""
    Image.preinit()
    Image.init()
    EvilImageFile.tries = tries
    Image.OPEN["PPM"] = (EvilImageFile, PpmImagePlugin._accept)
    return ClipScorer(clip_folder, device="cpu")


@pytest.mark.slow
def test_an_image_that_kills_its_process_costs_neither_an_actor_nor_its_shard(clip_folder, tmp_path):
    write_shards(tmp_path / "in", {1: {7}})
    config = ScoreConfig(shards=f"{tmp_path}/in/*.tar", output=tmp_path / "out", batch_size=4)
    with RayEngine(partial(load_beside_evil, clip_folder, tmp_path / "tries"), use_gpus=False) as engine:
        tally = process_shards(config, engine)
    assert not tally.failed
    assert (tally.counts.seen, tally.counts.dropped) == (60, {DropReason.DECODER_CRASH: 1})
    assert (tmp_path / "tries").read_text() == "xx"


@pytest.mark.slow
def test_a_model_that_no_actor_can_load_is_an_unusable_argument(capsys, tmp_path, clip_folder):
    other = make_clip(tmp_path / "model")
    (other / "model.safetensors").unlink()
    write_shard(tmp_path / "in" / "0.tar", [pair(1)])
    assert call("score", f"{tmp_path}/in/0.tar", tmp_path / "out", other) == 2
    said = capsys.readouterr().err
    assert "an actor can't start" in said
    assert "Traceback" not in said


def has_marks(process: psutil.Process, out: Path) -> bool:
    return any(out.glob("*_stats.json"))


def has_half_of_ray(process: psutil.Process, out: Path) -> bool:
    return any(child.name() == "raylet" for child in process.children())


@pytest.mark.slow
@pytest.mark.parametrize("is_time", [has_marks, has_half_of_ray], ids=["at work", "while Ray starts"])
def test_ctrl_c_stops_a_run_on_ray_soon_says_how_to_resume_and_leaves_no_process(clip_folder, tmp_path, is_time):
    for shard in range(40):
        write_shard(tmp_path / "in" / f"{shard:02d}.tar", [pair(100 * shard + i, size=(500, 500)) for i in range(60)])
    options = ["--model", str(clip_folder), "--device", "cpu", "--threshold", "0.12", "--engine", "ray"]
    command = [sys.executable, "-m", "clipfilter_wds", "rewrite", f"{tmp_path}/in/*.tar", "--output", f"{tmp_path}/out"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, start_new_session=True)
    driver = psutil.Process(process.pid)
    while not is_time(driver, tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.05)
    family = driver.children(recursive=True)
    with Stopwatch() as watch:
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=FOREVER)
        assert not psutil.wait_procs(family, timeout=FOREVER)[1]
        print(f"stopped within {watch.seconds():.2f} s")
        assert watch.seconds() < 5
    assert process.returncode == 130
    assert "start the same command again to resume" in err
    assert "Traceback" not in err
    assert len(list((tmp_path / "out").glob("*_stats.json"))) < 40
