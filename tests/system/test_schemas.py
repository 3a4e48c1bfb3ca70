"""The page on what is written names every field that is, and no other."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.rescoring.config import RescoreConfig
from clipfilter_wds.offline.rescoring.run import rescore_shards
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.types import DropReason
from tests.support.pages import DOCS, cells_of, section_of
from tests.support.toys import pair, write_shard

PAGE = (DOCS / "schemas.md").read_text()
#: Reasons that only tables of image paths know; docs/dataflow.md has them.
OF_TABLES = {"several_images"}


def names(section: str, table: int | None = None) -> set[str]:
    """What the first cells of a section's tables name, or of one of these tables."""
    text = section_of(PAGE, section)
    if table is not None:
        text = [part for part in re.split(r"\n\n", text) if part.startswith("|")][table]
    return {name for first, *_ in cells_of(text) for name in re.findall(r"`(\w+)`", first)}


@pytest.fixture(scope="module")
def written(scorer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("schemas")
    write_shard(folder / "0.tar", [pair(0), {"jpg": b"", "json": b"{}"}])
    write_shard(folder / "1.tar", [{"jpg": pair(0)["jpg"]}])
    packing = {"keep_fraction": 0.5, "samples_per_shard": 10}
    (folder / "torn.tar").write_bytes((folder / "0.tar").read_bytes()[:1500])
    runs = [("copied", "0.tar", {}), ("packed", "0.tar", packing), ("lacking", "1.tar", {"columns": "json:none"})]
    for name, shard, options in (*runs, ("torn", "torn.tar", {})):
        config = RewriteConfig(shards=str(folder / shard), output=folder / name, num_workers=0, **options)
        process_shards(config, scorer)
    embedded = ScoreConfig(shards=str(folder / "0.tar"), output=folder / "embedded", num_workers=0, embeddings="fp16")
    process_shards(embedded, scorer)
    rescore_shards(RescoreConfig(scores=folder / "embedded", method="neg_clip_loss", output=folder / "rescored"))
    return folder


def entries(path: Path) -> set[str]:
    return set(json.loads(path.read_text()))


def test_score_tables(written):
    schema = pq.read_schema(written / "copied/_scores/0.parquet")
    assert names("Score tables", 0) == set(schema.names)
    assert names("Score tables", 1) == set(json.loads(schema.metadata[b"clipfilter_wds"]))


def test_marks(written):
    copied = entries(written / "copied/0_stats.json")
    [packed] = (entries(path) for path in (written / "packed").glob("*_stats.json"))
    others = entries(written / "lacking/1_stats.json") | entries(written / "torn/torn_stats.json")
    assert names("Marks") | {"sources", "suffixes"} == copied | packed | others
    assert packed - copied == {"sources", "suffixes"}


def test_sources_of_a_packed_mark(written):
    [mark] = (json.loads(path.read_text()) for path in (written / "packed").glob("*_stats.json"))
    [told] = re.findall(r"a list of objects with\s(.*?);", PAGE, flags=re.DOTALL)
    assert re.findall(r"`(\w+)`", told) == list(mark["sources"][0])


def test_summary(written):
    assert names("Summary") == set().union(*(entries(path) for path in written.glob("*/summary.json")))


def test_reasons():
    assert names("Why a sample is dropped") - {"txt"} == {str(reason) for reason in DropReason} - OF_TABLES
