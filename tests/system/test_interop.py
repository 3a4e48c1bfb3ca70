"""Other tools read the output: the page about them runs, each tool in the version that it wants."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter_wds.cli import main
from tests.support.toys import pair, tar_members, write_shard

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"


@pytest.fixture(scope="module")
def folder(scorer, tmp_path_factory) -> Path:
    """``data``, laid out as img2dataset does, and ``data-filtered``, where one shard has no tar."""
    folder = tmp_path_factory.mktemp("interop")
    for shard in range(4):
        samples = [_sample(16 * shard + index, caption=" " if shard == 2 else None) for index in range(16)]
        write_shard(folder / "data" / f"{shard:05d}.tar", samples, start=16 * shard)
        records = [json.loads(sample["json"]) for sample in samples]
        pq.write_table(pa.Table.from_pylist(records), folder / "data" / f"{shard:05d}.parquet")
    (command,) = section("What other tools make of the output", "bash")
    options = ["--model", scorer.model_name, "--threshold", "0.1", "--num_workers", "0"]
    with contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
        main([*shlex.split(command)[1:], *options])
    assert ended.value.code == 0
    assert not (folder / "data-filtered" / "00002.tar").exists()
    return folder


def _sample(number: int, caption: str | None) -> dict[str, bytes]:
    sample = pair(number) if caption is None else {**pair(number), "txt": caption.encode()}
    uid = hashlib.md5(str(number).encode()).hexdigest()
    record = {"uid": uid, "key": f"{number:09d}", "caption": sample["txt"].decode(), "url": f"http://a.b/{number}.jpg"}
    return {**sample, "json": json.dumps(record).encode()}


def section(name: str, language: str) -> list[str]:
    """The code of one section of the page."""
    text = re.search(rf"^#+ {re.escape(name)}\n(.*?)(?=^#+ \w|\Z)", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)[1]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def members(folder: Path, extension: str) -> list[bytes]:
    """The kept samples' members of that name, as a plain tar reader finds them."""
    tars = sorted((folder / "data-filtered").glob("*.tar"))
    return [data for tar in tars for name, data in tar_members(tar) if name.endswith(extension)]


def test_webdataset_img2dataset_and_datacomp_find_what_they_expect(folder, monkeypatch):
    monkeypatch.chdir(folder)
    session: dict = {}
    for name in ("webdataset", "img2dataset", "DataComp"):
        (code,) = section(name, "python")
        exec(compile(code, f"{PAGE.name}, {name}", "exec"), session)

    kept = [json.loads(data) for data in members(folder, ".json")]
    assert session["num_samples"] == len(kept) > 0
    assert session["joined"].num_rows == 16
    stats = [json.loads(path.read_bytes()) for path in sorted((folder / "data-filtered").glob("*_stats.json"))]
    assert {record["shard"]: record["successes"] for record in stats if record["successes"]} == session["sizes"]
    subset = np.load("subset.npy")
    assert subset.dtype == np.dtype("u8,u8")
    assert [f"{high:016x}{low:016x}" for high, low in subset.tolist()] == sorted(record["uid"] for record in kept)


# --- in an environment of their own ---

COUNT = """
from argparse import Namespace
import json, sys, torch
from open_clip_train.data import get_wds_dataset

shards = "::".join("data-filtered/" + name for name in json.load(open("data-filtered/sizes.json")))
args = Namespace(
    train_data=shards, val_data=shards, train_num_samples=None, val_num_samples=None, dataset_resampled=False,
    train_data_upsampling_factors=None, seed=0, batch_size=1, workers=1, world_size=1,
)
for is_train in (True, False):
    data = get_wds_dataset(args, lambda image: torch.tensor(image.size), is_train, tokenizer=lambda text: [text])
    captions = [caption for _, batch in data.dataloader for caption in batch]
    print(json.dumps([data.dataloader.num_samples, captions]))
"""


class Environment:
    """A virtual environment with open_clip's training extra, that finds what it shares with this one in this one."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.bin = folder / "bin"
        packages = next(folder.glob("lib/python*/site-packages"))
        # Its own packages come first, such as the old webdataset; torch need not be downloaded again.
        (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, command: str, folder: Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "WIDS_CACHE": str(folder / "wids-cache")}
        environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def python(self, code: str, folder: Path) -> str:
        (folder / "code.py").write_text(textwrap.dedent(code))
        return self.run("python code.py", folder)


@pytest.mark.slow
def test_open_clip_trains_from_the_output_and_wids_indexes_it(folder, tmp_path):
    environment = Environment(tmp_path / "environment")
    captions = Counter(data.decode() for data in members(folder, ".txt"))
    num_kept = captions.total()

    (commands,) = section("open_clip", "bash")
    log = environment.run(commands, folder)
    assert re.search(rf"Train Epoch: 0 .*/{num_kept + -num_kept % 8} \(100%\)", log)  # in whole batches

    lines = [line for line in environment.python(COUNT, folder).splitlines() if line.startswith("[")]
    (num_trained, trained), (_, validated) = map(json.loads, lines)
    assert num_trained == num_kept
    assert Counter(trained) == Counter(validated) == captions

    (commands,), (code,) = section("wids", "bash"), section("wids", "python")
    environment.run(commands, folder)
    assert f"{num_kept} " in environment.python(code, folder)
