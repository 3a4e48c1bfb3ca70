"""The commands and scripts in the documents run as they stand, in order, page by page."""

import hashlib
import json
import random
import shlex
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from clipfilter_wds.cli import main
from clipfilter_wds.demo.drawing import draw, to_jpeg
from clipfilter_wds.demo.scenes import describe, random_scene
from tests.support.pages import PAGES, ROOT, blocks_of
from tests.support.toys import make_clip, write_shard

#: Pages whose Python another test of the documents runs, in a session that it prepares.
PYTHON_ELSEWHERE = {"training", "pipelines"}
#: Pages that take long.
LONG = ("selection",)
#: Commands that read shards in worker processes, unless they are told not to.
WITH_WORKERS = ("rewrite", "score")


def runs_here(page: Path) -> list:
    """The blocks of a page that no other test runs, and that have no reason not to be."""
    elsewhere = ("python",) if page.stem in PYTHON_ELSEWHERE else ()
    return [
        block
        for block in blocks_of(page.read_text())
        if block.language in ("bash", "python") and block.language not in elsewhere
        if not (block.not_run or block.run_by)
    ]


def pages_that_run() -> list:
    return [
        pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in LONG else ())
        for page in PAGES
        if runs_here(page)
    ]


def drawn_pair(rng: random.Random, name: str) -> dict[str, bytes]:
    scene = random_scene(rng, held_out=False)
    uid = hashlib.md5(name.encode()).hexdigest()
    return {
        "jpg": to_jpeg(draw(scene)),
        "txt": describe(scene, rng).encode(),
        "json": json.dumps({"uid": uid}).encode(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards, tables and a list under the names that the pages use, and tiny CLIPs in the place of the hub's."""
    folder = tmp_path_factory.mktemp("pages")
    for model in ("clip-vit-base-patch32", "clip-vit-large-patch14"):
        make_clip(folder / "openai" / model)
    rng = random.Random(0)
    uids = []
    for shard in range(100):
        # The first four are for training: a few batches.
        samples = [drawn_pair(rng, f"{shard}.{index}") for index in range(32 if shard < 4 else 1)]
        write_shard(folder / "data" / f"{shard:05d}.tar", samples, start=100 * shard)
        uids += [divmod(int(json.loads(sample["json"])["uid"], 16), 2**64) for sample in samples]
    np.save(folder / "uids.npy", np.array(sorted(uids)[:50], dtype="u8,u8"))
    (folder / "0.jpg").write_bytes(drawn_pair(rng, "0")["jpg"])
    rows = [{"image": "0.jpg", "caption": "a red circle", "path": "0.jpg", "text": "a red circle"}]
    table = pyarrow.Table.from_pylist(rows)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.csv.write_csv(table, folder / "pairs.csv")
    pyarrow.csv.write_csv(table, folder / "pairs.tsv", pyarrow.csv.WriteOptions(delimiter="\t"))
    pq.write_table(table, folder / "pairs.parquet")
    return folder


@pytest.mark.parametrize("page", pages_that_run())
def test_code_of_a_page_runs_as_it_stands(page, folder, tmp_path, monkeypatch):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(runs_here(page), start=1):
        if block.language == "python":
            exec(compile(block.code, f"{page.name}, block {number}", "exec"), session)
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "clipfilter-wds", f"{page.name}: mark why no test runs this, or what does: {line}"
            if arguments[0] in WITH_WORKERS:
                arguments += ["--num_workers", "0"]
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert ended.value.code == 0, line


def test_what_runs_a_block_elsewhere_is_there():
    for page in PAGES:
        for block in blocks_of(page.read_text()):
            assert not block.run_by or (ROOT / block.run_by).is_file(), block
