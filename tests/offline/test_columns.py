"""Fields of the json member in the score tables, and selecting by them."""

import json

import pyarrow as pa
import pytest

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.scores.embeddings import EmbeddingFiles
from clipfilter_wds.scores.table import ShardScores, read_metadata
from tests.support.outputs import bits, check_accounting
from tests.support.toys import pair, tar_members, write_shard

COLUMNS = "json:punsafe,json:meta.lang=text"
OPTIONS = {"batch_size": 4, "num_workers": 0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("in")
    for shard in range(2):
        samples = [{**pair(i), "json": json.dumps(record(i)).encode()} for i in range(11)]
        samples[3] = {"jpg": b"no image", **{name: samples[3][name] for name in ("txt", "json")}}
        del samples[5]["json"]
        write_shard(folder / f"{shard}.tar", samples, start=100 * shard)
    write_shard(folder / "empty.tar", [])
    return f"{folder}/*.tar"


def record(number: int) -> dict:
    return {"punsafe": number / 10, "meta": {"lang": "en" if number % 2 else "de"}}


def test_they_are_columns_of_their_types_and_choose(scorer, shards, tmp_path):
    config = ScoreConfig(shards=shards, output=tmp_path / "scores", columns=COLUMNS, **OPTIONS)
    process_shards(config, scorer)
    for name, num_samples in (("0", 11), ("1", 11), ("empty", 0)):
        scores = ShardScores.read(tmp_path / "scores" / f"{name}.parquet")
        assert scores.metadata.columns == ("json:punsafe=number", "json:meta.lang=text")
        assert scores.table.schema.field("punsafe").type == pa.float64()
        expected = [record(i) if i != 5 else {"punsafe": None, "meta": {"lang": None}} for i in range(num_samples)]
        assert scores.table["punsafe"].to_pylist() == [one["punsafe"] for one in expected]
        assert scores.table["meta.lang"].to_pylist() == [one["meta"]["lang"] for one in expected]
    where = "punsafe < 0.55 and meta.lang == 'en'"
    process_shards(RewriteConfig(shards=shards, output=tmp_path / "out", scores=tmp_path / "scores", where=where))
    check_accounting(tmp_path / "out")
    assert [name for name, _ in tar_members(tmp_path / "out/0.tar") if name.endswith("jpg")] == ["000000001.jpg"]


def test_they_are_the_same_bits_whatever_the_workers(scorer, shards, tmp_path):
    for num_workers in (0, 2):
        output = tmp_path / str(num_workers)
        plain = {"batch_size": 4, "num_workers": num_workers, "columns": COLUMNS, "where": "punsafe >= 0.5"}
        process_shards(RewriteConfig(shards=shards, output=output, **plain), scorer)
    assert bits(tmp_path / "0") == bits(tmp_path / "2")


@pytest.fixture(params=[False, True], ids=["score", "rewrite"])
def run(request, scorer, shards, tmp_path):
    """Run into ``out``, or another folder; how many samples were scored."""

    def run(columns: str | None, output: str = "out", **options) -> int:
        plain = {"shards": shards, "output": tmp_path / output, "columns": columns, **OPTIONS, **options}
        config = RewriteConfig(threshold=0.1, **plain) if request.param else ScoreConfig(**plain)
        return process_shards(config, scorer).num_scored

    return run


def test_tables_that_lack_them_are_made_again(run):
    assert [run(columns) for columns in (None, COLUMNS, COLUMNS, None, "json:punsafe")] == [22, 22, 0, 0, 0]


def test_those_that_are_there_stay_where_a_shard_is_scored_again(run, tmp_path):
    run(COLUMNS)
    assert run("json:other=bool,json:punsafe") == 22
    run(f"{COLUMNS},json:other=bool", "fresh")
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


def test_each_shard_keeps_its_own(run, scorer, shards, tmp_path):
    run(COLUMNS)
    for table in (tmp_path / "out").rglob("1.parquet"):
        table.unlink()
    assert run("json:other=bool") == 22
    found = {table.stem: read_metadata(table).columns for table in (tmp_path / "out").rglob("*.parquet")}
    assert found["1"] == ("json:other=bool",)
    assert found["0"] == ("json:punsafe=number", "json:meta.lang=text", "json:other=bool")


def test_one_of_another_type_is_replaced_only_where_that_is_asked_for(run, tmp_path):
    run(COLUMNS)
    before = bits(tmp_path / "out")
    says = r"has the column 'punsafe' as number, and integer is asked for; choose another folder, or .* --overwrite"
    with pytest.raises(ValueError, match=says):
        run("json:punsafe=integer")
    assert bits(tmp_path / "out") == before
    assert run("json:punsafe=integer", overwrite=True) == run("json:punsafe=integer", "fresh") == 22
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


def test_a_run_that_is_stopped_while_it_replaces_a_table_knows_what_that_had(run, monkeypatch, tmp_path):
    run(COLUMNS)
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingFiles, "write", _stop)
        with pytest.raises(OSError, match="stopped"):
            run(None, embeddings="fp16")
    assert run(None, embeddings="fp16") == 22
    run(COLUMNS, "fresh", embeddings="fp16")
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")


def _stop(*_) -> None:
    raise OSError("stopped")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "json:width"}, "json:width has the name of a column that every score table has"),
        ({"columns": "json:a", "scores": "scores"}, "columns are saved when shards are scored"),
        ({"columns": "json:a", "where": "b > 1"}, "there is no column 'b'; the tables have key, .*, uid, a$"),
        ({"columns": "json:a=text", "where": "a > 1"}, "does not go with the types"),
        (
            {"group_by": "language", "keep_fraction": 0.3},
            "group_by: there is no column 'language'; the tables have key",
        ),
        ({"group_limits": "en=0.3", "keep_fraction": 0.3}, "group_limits names groups, and group_by no column"),
    ],
)
def test_what_can_not_be_used_is_refused(shards, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RewriteConfig(shards=shards, output=tmp_path / "out", **options)


def test_of_each_group_the_same_fraction_or_its_own_is_kept(scorer, shards, tmp_path, caplog):
    plain = {"shards": shards, "columns": COLUMNS, "group_by": "meta.lang", "keep_fraction": 0.5, **OPTIONS}
    process_shards(RewriteConfig(output=tmp_path / "out", group_limits="de=0.25", **plain), scorer)
    summary = check_accounting(tmp_path / "out")
    seen = {"en": 10 - 4, "de": 12, "null": 2}
    assert summary["kept"] == round(0.5 * 6) + round(0.25 * 12) + round(0.5 * 2)
    assert sum(seen.values()) == summary["seen"] - 2
    assert summary["groups"] == {"column": "meta.lang", "limits": {"de": 0.25}}
    expected = bits(tmp_path / "out")
    assert process_shards(RewriteConfig(output=tmp_path / "out", group_limits="de=0.25", **plain), scorer).resumed == 3
    assert not caplog.messages
    from_scores = RewriteConfig(
        shards=shards, output=tmp_path / "later", scores=tmp_path / "out", group_by="meta.lang", keep_fraction=0.5,
        group_limits="de=0.25",
    )  # fmt: skip
    process_shards(from_scores)
    later = bits(tmp_path / "later")
    assert later == {name: digest for name, digest in expected.items() if not name.startswith("_scores")}
    with pytest.raises(ValueError, match=r"groups.limits.* there"):
        process_shards(RewriteConfig(output=tmp_path / "out", **plain), scorer)


@pytest.mark.parametrize("choice", [{"keep_fraction": 0.5}, {"threshold": 0.0, "samples_per_shard": 4}], ids=str)
def test_a_shard_whose_table_lacks_the_column_of_the_groups_fails_alone(scorer, shards, tmp_path, choice):
    scores = tmp_path / "scores"
    process_shards(ScoreConfig(shards=shards, output=scores, columns=COLUMNS, **OPTIONS), scorer)
    lacking = min(scores.rglob("*.parquet"))
    found = ShardScores.read(lacking)
    less = found.table.drop_columns(["meta.lang"])
    with lacking.open("wb") as file:
        ShardScores(table=less, metadata=found.metadata).write(file)
    config = RewriteConfig(
        shards=shards, output=tmp_path / "out", scores=scores, group_by="meta.lang", group_limits="en=0.5", **choice
    )
    tally = process_shards(config)
    says = f"group_by: there is no column 'meta.lang'; the tables have {', '.join(less.schema.names)}"
    assert list(tally.failed.values()) == [says]
    assert tally.counts.seen > 0


@pytest.mark.parametrize(
    "choice", [{"keep_fraction": 0.5}, {"threshold": 0.1}, {"threshold": 0.1, "samples_per_shard": 4}], ids=str
)
def test_a_limit_of_a_group_that_no_sample_is_in_is_told(scorer, shards, tmp_path, caplog, choice):
    choice = {"shards": shards, "group_by": "meta.lang", "group_limits": "de=0.25,eng=0.1", **choice, **OPTIONS}
    process_shards(RewriteConfig(output=tmp_path / "whole", columns=COLUMNS, **choice), scorer)
    process_shards(RewriteConfig(output=tmp_path / "again", scores=tmp_path / "whole/_scores", **choice))
    assert caplog.messages == ["group_limits has a limit for eng, and no sample has that as its meta.lang"] * 2
