import pytest

from clipfilter_wds.scores.folder import ScoreFolder, kind_of_scores, schema_of_scores
from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.scores.table import table_schema
from clipfilter_wds.shards.names import output_names, public_url
from clipfilter_wds.types import SampleRow, ShardError
from tests.support.score_tables import FINGERPRINT, plain_parquet, shard_scores, written


def write_tables(folder, urls, **changes) -> None:
    """A table per shard, named as `score` names them; its only sample has the shard's URL as key."""
    for url, name in output_names(urls).items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        changes = {"shard": public_url(url), "num_bytes": -1, **changes}
        path.write_bytes(written(shard_scores([SampleRow(url, 0)], **changes)))


def found_key(table: ScoreFolder, url: str) -> str:
    """Which shard the table is of that is found for a shard."""
    return table.read(url).keys[0]


@pytest.mark.parametrize("inner", ["", "_scores"])
def test_each_shard_has_its_table_whether_scored_or_rewritten(tmp_path, inner):
    urls = ["data/00000.tar", "data/00001.tar.gz", "s3://bucket/key/00002.tar?version=1", "pipe:cat /data/00003.tar"]
    write_tables(tmp_path / inner, urls)
    for folder in (tmp_path, str(tmp_path / inner)):
        table = ScoreFolder(folder)
        assert [found_key(table, url) for url in urls] == urls
        assert table.fingerprint == FINGERPRINT
        assert table.lacking(["data/9.tar", *urls, "x/8.tar"]) == ["data/9.tar", "x/8.tar"]


def test_shards_of_one_base_name_have_tables_of_their_own(tmp_path):
    urls = [f"/data/{part}/0.tar" for part in ("a", "b", "b/a", "c/b")]
    write_tables(tmp_path, urls)
    table = ScoreFolder(tmp_path)
    assert [found_key(table, url) for url in urls] == urls


@pytest.mark.parametrize("where", ["/mnt/copy", "s3://bucket/data", "https://host/x"])
def test_shards_that_moved_are_found_by_their_folders_and_names(tmp_path, where):
    write_tables(tmp_path, [f"/data/{name}.tar" for name in ("0", "a/0", "b/0", "b/a/0")])
    table = ScoreFolder(tmp_path)
    for name in ("0", "a/0", "b/0", "b/a/0"):
        assert found_key(table, f"{where}/{name}.tar") == f"/data/{name}.tar"
    assert table.lacking([f"{where}/b/1.tar"]) == [f"{where}/b/1.tar"]


def test_the_shard_itself_goes_before_one_of_its_name(tmp_path):
    write_tables(tmp_path, ["/data/0.tar", "/data/a/0.tar"])
    write_tables(tmp_path / "b", ["/new/a/0.tar"])
    table = ScoreFolder(tmp_path)
    assert found_key(table, "/new/a/0.tar") == "/new/a/0.tar"
    assert found_key(table, "/other/a/0.tar") == "/data/a/0.tar"


@pytest.mark.parametrize("find", [ScoreFolder, kind_of_scores, schema_of_scores])
def test_a_folder_that_is_not_on_this_machine_is_refused_with_the_cure(find):
    with pytest.raises(ValueError, match="are read from this machine; copy 's3://bucket/scores' to a local folder"):
        find("s3://bucket/scores")


def test_a_folder_may_be_named_like_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tables(tmp_path / "run:1", ["/data/0.tar"])
    assert found_key(ScoreFolder("run:1"), "/data/0.tar") == "/data/0.tar"
    assert kind_of_scores("run:1") == COSINES
    assert schema_of_scores("run:1").names == table_schema().names


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no score table in .*clipfilter-wds score"):
        ScoreFolder(tmp_path)
    with pytest.raises(ValueError, match="scores is empty; name the folder of score tables"):
        ScoreFolder("")
    with pytest.raises(ValueError, match=r"there is no folder '.*/none'"):
        ScoreFolder(tmp_path / "none")
    write_tables(tmp_path, ["/data/0.tar"])
    with pytest.raises(ValueError, match=r"0.parquet' is a file; name the folder of score tables"):
        ScoreFolder(tmp_path / "0.parquet")


def test_a_shard_without_a_table_is_named_with_the_cure(tmp_path):
    write_tables(tmp_path, ["/data/0.tar"])
    with pytest.raises(ShardError, match=r"no score table of it in .*score it first"):
        ScoreFolder(tmp_path).read("/data/1.tar")


def test_a_shard_of_another_size_is_refused_with_both_sizes(tmp_path):
    shard = tmp_path / "0.tar"
    shard.write_bytes(bytes(10))
    write_tables(tmp_path / "scores", [str(shard)], num_bytes=10)
    table = ScoreFolder(tmp_path / "scores")
    assert found_key(table, str(shard)) == str(shard)
    shard.write_bytes(bytes(11))
    with pytest.raises(ShardError, match="11 bytes here, 10 in"):
        table.read(str(shard))


def test_tables_of_different_fingerprints_are_refused_with_both_values(tmp_path):
    write_tables(tmp_path, ["/data/0.tar"])
    write_tables(tmp_path, ["/data/1.tar"], fingerprint={**FINGERPRINT, "model": "copy"})
    ScoreFolder(tmp_path)
    write_tables(tmp_path, ["/data/2.tar"], fingerprint={**FINGERPRINT, "resize": 64})
    with pytest.raises(ValueError, match=r"2\.parquet' does not go .*resize 64 there, 32 here"):
        ScoreFolder(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"successes": 12}', '{"failed_shards": null}', "\xff"])
def test_a_summary_of_something_else_is_named(tmp_path, text):
    write_tables(tmp_path, ["/data/0.tar"])
    (tmp_path / "summary.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"summary\.json' is not the summary of the run that wrote the tables"):
        ScoreFolder(tmp_path)


@pytest.mark.parametrize("data", [b"", b"PAR1", plain_parquet(), plain_parquet(clipfilter_wds=b'{"version": 1}')])
def test_a_file_among_the_tables_that_is_none_is_refused(tmp_path, data):
    write_tables(tmp_path, ["/data/0.tar"])
    (tmp_path / "1.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"1\.parquet' is not a score table of clipfilter-wds: .* delete it, and"):
        ScoreFolder(tmp_path)
