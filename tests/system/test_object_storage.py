"""The same run on local files and on a real S3 server that fails now and then."""

import contextlib
import io
import json
import re
from pathlib import Path

import fsspec
import pytest

from clipfilter_wds.cli import main
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from tests.support.outputs import check_accounting
from tests.support.servers import now_and_then
from tests.support.toys import pair, write_shard


@pytest.fixture
def storage(s3, short_pauses, tmp_path):
    """The S3 server, with shards in ``s3://bucket/in`` that are also in ``tmp_path/in``."""
    s3.reset()
    fs = fsspec.filesystem("s3")
    for shard in range(3):
        path = write_shard(tmp_path / "in" / f"{shard:05d}.tar", [pair(100 * shard + i) for i in range(30)])
        fs.put_file(str(path), f"bucket/in/{path.name}")
    yield s3
    s3.reset()
    fs.rm("bucket/in", recursive=True)
    if fs.exists("bucket/out"):
        fs.rm("bucket/out", recursive=True)


def run(clip_folder: Path, shards: str, output: str, command: str = "rewrite", **options) -> tuple[int, str]:
    """Run the command; its exit code, and all that it said."""
    options = {"batch_size": 8, "num_workers": 2, **options}
    if command == "rewrite":
        options = {"threshold": 0.12, **options}
    named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        main([command, shards, "--output", output, "--model", str(clip_folder), "--device", "cpu", *named])
    return ended.value.code, said.getvalue()


def download(folder: Path, url: str = "bucket/out") -> Path:
    fsspec.filesystem("s3", use_listings_cache=False).get(url, str(folder), recursive=True)
    return folder


def outcome(folder: Path) -> dict[str, object]:
    """Every file's content, but for where the shards came from and how long it took."""
    contents: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".parquet":
            contents[name] = ShardScores.read(path).table.to_pylist()
        elif name.endswith("_stats.json"):
            contents[name] = {**json.loads(path.read_bytes()), "source": None, "storage_version": None}
        elif path.is_file() and name != "summary.json":
            contents[name] = path.read_bytes()
    return contents


def test_the_outcome_is_that_of_local_files_however_the_storage_fails(storage, clip_folder, tmp_path):
    assert run(clip_folder, f"{tmp_path}/in/*.tar", f"{tmp_path}/out")[0] == 0
    storage.reset(now_and_then(4, cut=0.15, busy=0.15, slow=0.1))
    code, said = run(clip_folder, "s3://bucket/in/*.tar", "s3://bucket/out")
    assert code == 0, said
    assert all(storage.done[kind] for kind in ("cut", "busy", "slow"))
    storage.reset()
    found = download(tmp_path / "downloaded")
    assert outcome(found) == outcome(tmp_path / "out")
    assert check_accounting(found)["seen"] == 90

    # Started again, it finds everything done, and reads no shard.
    storage.reset()
    assert run(clip_folder, "s3://bucket/in/*.tar", "s3://bucket/out")[0] == 0
    assert json.loads(fsspec.filesystem("s3").cat("bucket/out/summary.json"))["resumed_shards"] == 3


def test_a_shard_that_disappears_after_it_was_listed_fails_alone(storage, clip_folder, tmp_path):
    seen = []

    def fault(method: str, path: str) -> str | None:
        seen.append((method, path))
        return "missing" if method in ("GET", "HEAD") and "in/00001.tar" in path else None

    storage.reset(fault)
    code, _ = run(clip_folder, "s3://bucket/in/*.tar", f"{tmp_path}/out")
    summary = json.loads((tmp_path / "out/summary.json").read_bytes())
    assert code == 1
    assert list(summary["failed_shards"]) == ["s3://bucket/in/00001.tar"]
    assert "there is no such file" in summary["failed_shards"]["s3://bucket/in/00001.tar"]
    assert (summary["seen"], len(list((tmp_path / "out").glob("*_stats.json")))) == (60, 2)


def test_score_tables_go_to_object_storage_too(storage, clip_folder, tmp_path):
    assert run(clip_folder, "s3://bucket/in/*.tar", "s3://bucket/out", command="score")[0] == 0
    assert run(clip_folder, f"{tmp_path}/in/*.tar", f"{tmp_path}/out", command="score")[0] == 0
    assert outcome(download(tmp_path / "downloaded")) == outcome(tmp_path / "out")


def test_a_table_that_the_storage_does_not_give_is_not_called_damaged(storage, clip_folder, tmp_path):
    assert run(clip_folder, "s3://bucket/in/*.tar", "s3://bucket/out", command="score")[0] == 0
    storage.reset(lambda method, path: "cut" if method == "GET" and path.endswith("00001.parquet") else None)
    code, said = run(clip_folder, "s3://bucket/in/*.tar", "s3://bucket/out", command="score")
    assert code == 1
    assert "can't read 's3://bucket/out/00001.parquet'" in said
    assert "start the same command again to resume" in said
    assert "delete" not in said


def test_no_credential_of_a_url_is_ever_written_or_said(storage, clip_folder, tmp_path):
    web = storage.address.replace("http://", "http://someone:SECRET@")
    shards = f"{web}/bucket/in/0000{{0..1}}.tar?token=SECRET,{web}/bucket/in/missing.tar?token=SECRET"
    code, said = run(clip_folder, shards, f"{tmp_path}/out")
    assert code == 1
    assert "SECRET" not in said
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert b"SECRET" not in path.read_bytes(), path
            assert b"secret-of-tests" not in path.read_bytes(), path
    summary = json.loads((tmp_path / "out/summary.json").read_bytes())
    assert (summary["seen"], list(summary["failed_shards"])) == (60, [f"{storage.address}/bucket/in/missing.tar"])

    for unusable in (f"{web}/bucket/in/{{0..1.tar?token=SECRET", f"{web}/bucket/in/?token=SECRET", "s3://K:SECRET@b/*"):
        code, said = run(clip_folder, unusable, f"{tmp_path}/other")
        assert code == 2, said
        assert "SECRET" not in said
    code, said = run(clip_folder, f"{tmp_path}/in/*.tar", f"{web}/out?token=SECRET")
    assert code == 2
    assert "SECRET" not in said
    assert re.search(r"can be read but not written to", said)


def test_an_output_that_can_not_be_written_is_an_error_at_once(storage, clip_folder, tmp_path):
    code, said = run(clip_folder, f"{tmp_path}/in/*.tar", "s3://no-such-bucket/out")
    assert code == 2, said
    assert "can't write to output 's3://no-such-bucket/out'" in said
    assert "Traceback" not in said


def test_an_output_among_the_input_is_refused(storage, clip_folder):
    code, said = run(clip_folder, "s3://bucket/in/*.tar", "s3://bucket/in")
    assert code == 2
    assert "holds input; choose another" in said


def test_scored_with_the_cache_and_cut_without_it_and_the_other_way_round(storage, cache, clip_folder, tmp_path):
    kept, plain = "simplecache::s3://bucket/in/*.tar", "s3://bucket/in/*.tar"
    for name, shards in {"kept": kept, "plain": plain}.items():
        assert run(clip_folder, shards, f"{tmp_path}/scores-{name}", command="score")[0] == 0
    assert ScoreFolder(tmp_path / "scores-kept").fingerprint == ScoreFolder(tmp_path / "scores-plain").fingerprint
    storage.reset()
    for name, shards in {"plain": kept, "kept": plain}.items():
        scores = f"{tmp_path}/scores-{name}"
        code, said = run(clip_folder, shards, f"{tmp_path}/out-{name}", scores=scores)
        assert code == 0, said
        if shards is kept:
            assert storage.requests["GET"] <= 1  # of a listing
    assert outcome(tmp_path / "out-kept") == outcome(tmp_path / "out-plain")
