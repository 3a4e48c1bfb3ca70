import functools
import gzip
import http.server
import importlib.util
import os
import posixpath
import random
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import hypothesis.strategies as st
import pytest
import zstandard
from hypothesis import given, settings

from clipfilter_wds.shards.names import output_names, public_url, shard_folder, shard_name
from clipfilter_wds.shards.open import DamagedStreamError, open_shard, shard_num_bytes
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.shards.split import split_by_worker
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.types import DropReason, ShardError
from tests.support.toys import tar_bytes, write_shard, write_tar


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with shards 000.tar to 011.tar and a folder in it."""
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        Path(f"{number:03d}.tar").touch()
    Path("sub/deep").mkdir(parents=True)
    for name in ("sub/a.tar", "sub/b.tar", "sub/deep/c.tar"):
        Path(name).touch()
    return tmp_path


def names_of(urls: list[str]) -> list[str]:
    return [os.path.relpath(url) for url in urls]


def read_all(url: str, *, allow_pipe: bool = False) -> bytes:
    with open_shard(url, allow_pipe=allow_pipe) as shard:
        return shard.stream.read()


def sample_bytes(url: str, *, allow_pipe: bool = False):
    """Members of the samples without a problem, and how the shard ended."""
    with open_shard(url, allow_pipe=allow_pipe) as shard:
        *samples, end = read_samples(shard, SampleLayout())
    return [(member.name, member.data) for sample in samples for member in sample.members], end


# --- expanding ---


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ("000.tar", ["000.tar"]),
        (Path("000.tar"), ["000.tar"]),
        ("{000..003}.tar", ["000.tar", "001.tar", "002.tar", "003.tar"]),
        ("{009..011}.tar", ["009.tar", "010.tar", "011.tar"]),
        ("00{0,5,3}.tar", ["000.tar", "005.tar", "003.tar"]),
        ("0{0{8..9},1{0..1}}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("0{1{0..1},0{0,1}}.tar", ["010.tar", "011.tar", "000.tar", "001.tar"]),
        ("{sub/{a,b},000}.tar", ["sub/a.tar", "sub/b.tar", "000.tar"]),
        ("{000,sub/{a,b}}.tar,001.tar", ["000.tar", "sub/a.tar", "sub/b.tar", "001.tar"]),
        ("000.tar,00{1,2}.tar, 003.tar,", ["000.tar", "001.tar", "002.tar", "003.tar"]),
        ("01?.tar", ["010.tar", "011.tar"]),
        ("00[13].tar", ["001.tar", "003.tar"]),
        ("sub/*.tar,000.tar", ["sub/a.tar", "sub/b.tar", "000.tar"]),
        ("sub/**/*.tar", ["sub/a.tar", "sub/b.tar", "sub/deep/c.tar"]),
        ("{sub,sub/deep}/*.tar", ["sub/a.tar", "sub/b.tar", "sub/deep/c.tar"]),
        (["001.tar", "{000..001}.tar"], ["001.tar", "000.tar"]),
        ([Path("sub/a.tar"), "sub/b.tar"], ["sub/a.tar", "sub/b.tar"]),
        (("000.tar",), ["000.tar"]),
    ],
)
def test_every_way_to_name_shards_gives_them_in_order(folder, shards, expected):
    assert names_of(expand_shards(shards)) == expected


@pytest.mark.parametrize(
    "shards",
    [
        ["000.tar", "000.tar"],
        "000.tar,000.tar",
        "{000,000}.tar",
        ["00*.tar", "000.tar", "{001..009}.tar"],
        ["000.tar", "00*.tar"],
        ["000.tar", "./000.tar"],
        ["000.tar", "sub/../000.tar"],
        ["000.tar", Path("000.tar").absolute],
    ],
    ids=str,
)
def test_a_shard_that_is_named_twice_in_any_way_is_read_once(folder, shards):
    shards = [item() if callable(item) else item for item in shards] if isinstance(shards, list) else shards
    urls = expand_shards(shards)
    assert len({Path(url).resolve() for url in urls}) == len(urls)


@pytest.mark.parametrize(
    "name", ["a,b.tar", "x[1].tar", "a{b.tar", "{0..3}.tar", "w*.tar", "w?.tar", "@x.tar", "ü ñ.tar", "#.tar"]
)
@pytest.mark.parametrize("spell", [str, Path, lambda name: [name], lambda name: str(Path(name).absolute())])
def test_a_file_that_is_there_is_meant_as_it_is_written(tmp_path, monkeypatch, name, spell):
    monkeypatch.chdir(tmp_path)
    Path("wild.tar").touch()
    Path(name).write_bytes(tar_bytes([("a.jpg", b"1")]))
    [url] = expand_shards(spell(name))
    assert Path(url).resolve() == Path(name).resolve()
    assert read_all(url) == Path(name).read_bytes()


def test_a_list_file_names_one_pattern_per_line(folder):
    Path("list.txt").write_text("# comment\n000.tar\n\n  sub/*.tar  \n{001..002}.tar\n000.tar\n#003.tar\n")
    expected = ["000.tar", "sub/a.tar", "sub/b.tar", "001.tar", "002.tar"]
    assert names_of(expand_shards("@list.txt")) == expected
    assert names_of(expand_shards(["011.tar", "@list.txt"])) == ["011.tar", *expected]
    assert names_of(expand_shards("@" + str(folder / "list.txt"))) == expected


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "no shard matches an empty list"),
        ("", "folder|no shard"),
        (",", "no shard matches ','"),
        ("nothing*.tar", r"no shard matches 'nothing\*.tar'"),
        (["nothing*.tar", "x?.tar"], r"no shard matches 'nothing\*.tar'"),
        ("missing.tar", "'missing.tar': there is no such file"),
        (["000.tar", "missing.tar"], "'missing.tar': there is no such file"),
        ("{010..012}.tar", "'012.tar': there is no such file"),
        ("sub", r"'sub' is a folder; name its shards, for example 'sub/\*.tar'"),
        ("sub/", r"'sub/' is a folder; name its shards, for example 'sub/\*.tar'"),
        (Path("sub"), "is a folder"),
        ("000.tar,sub", "'sub' is a folder"),
        ("{000..", "is not a brace range like {00000..00999}"),
        ("{000..003.tar", "is not a brace range like {00000..00999}"),
        ("000}.tar", "is not a brace range like {00000..00999}"),
        ("{a,{b,c}.tar", "is not a brace range like {00000..00999}"),
        ("@missing.txt", "can't read the list of shards 'missing.txt': No such file"),
        ("@sub", "can't read the list of shards 'sub': Is a directory"),
        ("@empty.txt", "no shard matches '@empty.txt'"),
    ],
)
def test_what_names_no_shard_is_an_error_that_says_so(folder, shards, message):
    Path("empty.txt").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        expand_shards(shards)


@pytest.mark.parametrize(
    "shards", ["pipe:cat 000.tar", ["000.tar", "pipe:cat 000.tar"], "000.tar,pipe:cat 000.tar", "@list.txt"]
)
def test_a_pipe_is_refused_wherever_it_stands(folder, shards):
    Path("list.txt").write_text("000.tar\npipe:cat 000.tar\n")
    with pytest.raises(ValueError, match="would run a shell command; pass allow_pipe=True"):
        expand_shards(shards)
    assert expand_shards(shards, allow_pipe=True)[-1] == "pipe:cat 000.tar"


def test_file_urls_are_shards_of_this_machine(folder):
    url = (folder / "000.tar").as_uri()
    assert expand_shards(url) == [url]
    assert [urlsplit(found).path for found in expand_shards(f"file://{folder}/00[01].tar")] == [
        f"{folder}/000.tar",
        f"{folder}/001.tar",
    ]
    assert shard_folder(url) == str(folder.resolve())
    with pytest.raises(ValueError, match="is a folder"):
        expand_shards(f"file://{folder}/sub")
    with pytest.raises(ValueError, match="no such file"):
        expand_shards(f"file://{folder}/missing.tar")


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def test_shards_in_another_storage_are_expanded_and_read(memory):
    data = tar_bytes([("a.jpg", b"1"), ("a.txt", b"2")])
    for name in ("x/0.tar", "x/1.tar", "x/sub/2.tar"):
        memory.pipe(f"/{name}", data)
    assert [urlsplit(url).path for url in expand_shards("memory://x/*.tar")] == ["/x/0.tar", "/x/1.tar"]
    urls = expand_shards("memory://x/{0..1}.tar")
    assert urls == ["memory://x/0.tar", "memory://x/1.tar"]
    assert shard_folder(urls[0]).startswith("memory://")
    assert shard_num_bytes(urls[0]) == len(data)
    for url in [*urls, *expand_shards("memory://x/**/2.tar")]:
        assert read_all(url) == data


def test_a_missing_shard_of_another_storage_is_an_error_when_it_is_opened(memory):
    [url] = expand_shards("memory://missing.tar")
    with pytest.raises(ShardError, match="there is no such file"):
        read_all(url)


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_storage_whose_package_is_missing_names_the_pip_command(scheme, package, extra):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    command = rf"pip install 'clipfilter-wds\[{extra}\]'"
    with pytest.raises(ValueError, match=command):
        expand_shards(f"{scheme}://bucket/{{000..003}}.tar")
    with pytest.raises(ShardError, match=command):
        read_all(f"{scheme}://bucket/000.tar")


def test_an_unknown_scheme_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="nonsense"):
        expand_shards("nonsense://bucket/000.tar")


# --- names ---


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("000.tar", "000"),
        ("/a/b/000.tar.gz", "000"),
        ("000.TAR", "000"),
        ("000.tgz", "000"),
        ("000.tar.zst", "000"),
        ("000.tar.zstd", "000"),
        ("a.tar.b.tar", "a.tar.b"),
        ("000", "000"),
        ("s3://b/x/00000.tar.gz?v=1", "00000"),
        ("https://user:secret@host/x/00000.tar?token=secret#part", "00000"),
        ("what?.tar", "what?"),
        ("pipe:cat /data/000.tar", "000"),
    ],
)
def test_a_shard_is_named_after_its_file(url, name):
    assert shard_name(url) == name


@pytest.mark.parametrize("url", ["", "a/", "..", "a/..", "/", ".tar", "a/.tar.gz", "...tar", "a\\b.tar", "a\0.tar"])
def test_a_shard_without_a_base_name_is_refused(url):
    with pytest.raises(ValueError, match="no base name"):
        shard_name(url)


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        (["/a/0.tar", "/b/1.tar"], ["0", "1"]),
        (["/a/0.tar", "/b/0.tar"], ["a/0", "b/0"]),
        (["/r/a/0.tar", "/r/b/c/0.tar", "/r/1.tar"], ["a/0", "b/c/0", "1"]),
        (["/r/0.tar", "/r/b/0.tar"], ["0", "b/0"]),
        (["s3://b/x/0.tar", "s3://b/y/0.tar"], ["x/0", "y/0"]),
        (["s3://b/0.tar", "/data/0.tar"], ["b/0", "data/0"]),
        (["https://h/x/0.tar?token=1", "https://h/y/0.tar?token=2"], ["x/0", "y/0"]),
        (["x/../a/0.tar", "b/0.tar"], ["a/0", "b/0"]),
    ],
)
def test_output_names_are_flat_where_they_differ_and_nested_where_not(urls, names):
    assert output_names(urls) == dict(zip(urls, names, strict=True))


@pytest.mark.parametrize(
    "urls",
    [["0.tar", "0.tar.gz"], ["/a/0.tar", "/a/0.tgz", "/b/1.tar"], ["https://h/0.tar?v=1", "https://h/0.tar?v=2"]],
)
def test_two_shards_that_would_get_one_name_are_refused(urls):
    with pytest.raises(ValueError, match=r"would both be written to '(a/)?0\.tar'; rename one") as error:
        output_names(urls)
    assert all(repr(url.partition("?")[0]) in str(error.value) for url in urls if "0.t" in url)


folders = st.lists(st.sampled_from(["a", "b", "..", ".", "", "a.tar", "%2e%2e", "~"]), max_size=4).map("/".join)
schemes = st.sampled_from(["", "/", "../", "s3://b/", "https://u:p@h/"])
base_names = st.sampled_from(["0.tar", "1.tar", "0.tar.gz", "0", "x?y.tar", "..b.tar", "a b.tar"])


@settings(max_examples=400, deadline=None)
@given(st.lists(schemes, min_size=1, max_size=2), st.lists(st.tuples(folders, base_names), max_size=4), st.data())
def test_output_names_are_all_different_and_never_leave_the_folder(schemes, places, data):
    urls = [f"{data.draw(st.sampled_from(schemes))}{folder}/{name}" for folder, name in places]
    urls = list(dict.fromkeys(url.removeprefix("//") for url in urls))
    try:
        names = output_names(urls)
    except ValueError as error:
        assert "would both be written to" in str(error)  # noqa: PT017  # shards of one name are allowed to be refused
        return
    assert list(names) == urls
    assert len(set(names.values())) == len(urls)
    for name in names.values():
        assert not name.startswith("/")
        assert ".." not in name.split("/")
        assert name == posixpath.normpath(name) != "."


@pytest.mark.parametrize(
    "urls",
    [
        ["https://h/../x/0.tar", "https://h/y/0.tar"],
        ["s3://b/a/../../x/0.tar", "s3://b/y/0.tar"],
        ["memory://../../0.tar", "memory://y/0.tar"],
    ],
)
def test_no_way_up_in_a_url_leads_out_of_the_output_folder(urls):
    assert all(".." not in name for name in output_names(urls).values())


# --- public URLs ---

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("url", "public"),
    [
        (f"https://user:{SECRET}@host:8080/a/0.tar?sig={SECRET}#{SECRET}", "https://host:8080/a/0.tar"),
        (f"https://{SECRET}@host/a%20b/0.tar", "https://host/a%20b/0.tar"),
        (f"https://user:{SECRET}@extra@host/0.tar", "https://host/0.tar"),
        (f"s3://key:{SECRET}@bucket/0.tar", "s3://bucket/0.tar"),
        ("s3://bucket/a@b/0.tar", "s3://bucket/a@b/0.tar"),
        ("/data/what?.tar", "/data/what?.tar"),
        ("/data/../x/0.tar", "/x/0.tar"),
    ],
)
def test_a_public_url_keeps_the_place_and_no_secret(url, public):
    assert public_url(url) == public


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@host/0.tar",
        f"https://host/0.tar?X-Amz-Signature={SECRET}",
        f"simplecache::https://user:{SECRET}@host/0.tar",
        f"simplecache::https://host/0.tar?sig={SECRET}",
        f"filecache::s3://key:{SECRET}@bucket/0.tar",
        f"pipe:curl -s https://user:{SECRET}@host/0.tar",
    ],
)
def test_no_secret_of_any_kind_of_url_is_in_the_public_one(url):
    assert SECRET not in public_url(url)


def test_the_public_url_of_a_relative_path_is_absolute(folder):
    assert public_url("sub/a.tar") == str(folder.resolve() / "sub/a.tar")


# --- who reads what ---


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(1, 20), st.integers(0, 12))
def test_every_block_of_every_shard_is_read_once_and_no_worker_idles(num_shards, num_workers, num_blocks):
    shards = [f"{number}.tar" for number in range(num_shards)]
    parts = [split_by_worker(shards, worker, num_workers) for worker in range(num_workers)]
    assert all(parts) == (num_shards > 0)
    read = [
        (part.url, block)
        for worker in parts
        for part in worker
        for block in range(num_blocks)
        if block % part.num_parts == part.part
    ]
    assert sorted(read) == sorted((url, block) for url in shards for block in range(num_blocks))
    for url in shards:
        sharers = [part for worker in parts for part in worker if part.url == url]
        assert sorted(part.part for part in sharers) == list(range(sharers[0].num_parts))
        assert {part.num_parts for part in sharers} == {len(sharers)}


@given(st.integers(1, 40), st.integers(1, 20))
def test_no_worker_has_more_than_one_shard_more_than_another(num_shards, num_workers):
    shards = [f"{number}.tar" for number in range(num_shards)]
    loads = [
        sum(1 / part.num_parts for part in split_by_worker(shards, worker, num_workers))
        for worker in range(num_workers)
    ]
    assert max(loads) - min(loads) < 1 + 1e-9


# --- compressed shards ---

noise = random.Random(0)
PAIRS = [
    (f"{key:04d}.{ext}", data)
    for key in range(60)
    for ext, data in [("jpg", noise.randbytes(4000)), ("txt", f"caption number {key} ".encode() * 20)]
]
TAR = tar_bytes(PAIRS)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def skippable_frame(data: bytes) -> bytes:
    """A Zstandard frame that readers pass over: pzstd begins with one, seekable files end with one."""
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


PACKED = {
    "plain": TAR,
    "gzip": gzip.compress(TAR),
    "gzip of many members": b"".join(gzip.compress(TAR[at : at + 10_000]) for at in range(0, len(TAR), 10_000)),
    "gzip with padding": gzip.compress(TAR) + bytes(1000),
    "zstd": zstd(TAR),
    "zstd of many frames": b"".join(zstd(TAR[at : at + 10_000]) for at in range(0, len(TAR), 10_000)),
    "zstd with a seek table": zstd(TAR) + skippable_frame(b"seek table"),
    "zstd as pzstd writes it": skippable_frame(bytes(4)) + zstd(TAR),
    "zstd without content size": zstandard.ZstdCompressor(write_content_size=False).compress(TAR),
}


@pytest.mark.parametrize("packing", PACKED)
def test_a_compressed_shard_is_unpacked_by_its_magic_bytes_whatever_its_name(tmp_path, packing):
    path = tmp_path / "0.tar"
    path.write_bytes(PACKED[packing])
    assert read_all(str(path)) == TAR
    members, end = sample_bytes(str(path))
    assert members == PAIRS
    assert (end.num_samples, end.torn, end.num_bytes) == (60, False, len(PACKED[packing]))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5])
def test_files_shorter_than_any_magic_are_read_as_they_are(tmp_path, size):
    path = tmp_path / "0.tar"
    path.write_bytes(b"tiny!"[:size])
    assert read_all(str(path)) == b"tiny!"[:size]


def check_damaged(path: Path) -> None:
    """Whatever the damage: whole samples as they were, then at most one torn, or a ShardError."""
    try:
        with open_shard(str(path)) as shard:
            *samples, end = read_samples(shard, SampleLayout())
    except ShardError:
        return
    assert [sample.index for sample in samples] == list(range(end.num_samples))
    assert [sample.problem for sample in samples] == [
        DropReason.TORN if end.torn and sample.index == end.num_samples - 1 else None for sample in samples
    ]
    usable = [(member.name, member.data) for sample in samples for member in sample.members]
    assert usable == PAIRS[: len(usable)]


compressions = [name for name in PACKED if name != "plain"]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(compressions), st.floats(0, 1))
def test_a_truncated_compressed_shard_is_torn_and_its_whole_samples_are_used(tmp_path_factory, packing, share):
    path = tmp_path_factory.getbasetemp() / "truncated.tar"
    packed = PACKED[packing]
    path.write_bytes(packed[: int(share * len(packed))])
    check_damaged(path)


@pytest.mark.parametrize("packing", ["gzip", "zstd", "gzip of many members", "zstd of many frames"])
def test_half_of_a_compressed_shard_still_yields_samples(tmp_path, packing):
    path = tmp_path / "0.tar"
    path.write_bytes(PACKED[packing][: len(PACKED[packing]) // 2])
    members, end = sample_bytes(str(path))
    assert end.torn
    assert members == PAIRS[: len(members)]
    assert members


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(compressions), st.floats(0, 1, exclude_max=True), st.binary(min_size=8, max_size=64))
def test_a_corrupted_compressed_shard_never_raises_anything_else(tmp_path_factory, packing, share, garbage):
    path = tmp_path_factory.getbasetemp() / "corrupted.tar"
    packed = bytearray(PACKED[packing])
    at = int(share * len(packed))
    packed[at : at + len(garbage)] = garbage
    path.write_bytes(packed)
    try:
        _, end = sample_bytes(str(path))
    except ShardError:
        return
    assert end.num_samples <= 60


def test_a_damaged_stream_has_one_kind_of_error(tmp_path):
    path = tmp_path / "0.tar"
    for packed in (PACKED["gzip"][:-100], gzip.compress(TAR)[:-8] + bytes(8), zstd(TAR)[:-4] + bytes(4)):
        path.write_bytes(packed)
        with pytest.raises(DamagedStreamError):
            read_all(str(path))


# --- opening ---


@pytest.mark.parametrize("url", ["missing.tar", "file:///missing.tar", "sub"])
def test_what_can_not_be_opened_is_a_shard_error(folder, url):
    with pytest.raises(ShardError, match="can't open it: "):
        read_all(url)


def test_a_pipe_is_only_run_when_it_is_allowed(tmp_path):
    path = write_tar(tmp_path / "0.tar", PAIRS)
    mark = tmp_path / "ran"
    url = f"pipe:touch {mark}; cat {path}"
    with pytest.raises(ShardError, match="allow_pipe=True"):
        read_all(url)
    assert not mark.exists()
    assert read_all(url, allow_pipe=True) == TAR
    assert mark.exists()
    assert sample_bytes(url, allow_pipe=True)[1].num_bytes == -1


def test_a_compressed_shard_is_unpacked_from_a_pipe_that_delivers_slowly(tmp_path):
    path = tmp_path / "0"
    path.write_bytes(PACKED["zstd"])
    url = f"pipe:head -c 2 {path}; sleep 0.2; tail -c +3 {path}"
    assert read_all(url, allow_pipe=True) == TAR


@pytest.mark.parametrize(
    "command",
    ["cat {missing}", "cat {path}; exit 3", "head -c 100000 {path}; exit 3", "false"],
    ids=["no file", "fails at the end", "fails halfway", "nothing"],
)
def test_a_pipe_whose_command_fails_is_a_shard_error_and_not_a_short_shard(tmp_path, command):
    path = write_tar(tmp_path / "0.tar", PAIRS)
    url = "pipe:" + command.format(path=path, missing=tmp_path / "missing")
    with pytest.raises(ShardError):
        sample_bytes(url, allow_pipe=True)


def test_a_pipe_that_is_not_read_to_its_end_is_closed_quietly(tmp_path):
    path = write_tar(tmp_path / "0.tar", PAIRS)
    with path.open("ab") as file:
        file.write(bytes(4 << 20))
    members, end = sample_bytes(f"pipe:cat {path}", allow_pipe=True)
    assert members == PAIRS
    assert not end.torn


# --- HTTP ---


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and under /short/ promises more bytes than it sends."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        kind, _, name = self.path.partition("?")[0].lstrip("/").partition("/")
        if kind == "short":
            self._send_short(Path(self.directory, name).read_bytes())
        elif kind == "streamed":
            self._send_streamed(Path(self.directory, name).read_bytes())
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        kind, _, name = self.path.partition("?")[0].lstrip("/").partition("/")
        if kind == "short":
            self._send_head(Path(self.directory, name).stat().st_size)
        elif kind == "streamed":
            self._send_head(None)
        else:
            super().do_HEAD()

    def _send_head(self, num_bytes: int | None) -> None:
        self.send_response(200)
        if num_bytes is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(num_bytes))
        self.end_headers()

    def _send_short(self, data: bytes) -> None:
        self._send_head(len(data))
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def _send_streamed(self, data: bytes) -> None:
        """Without a length, and the first bytes one by one."""
        self._send_head(None)
        for piece in [data[:1], data[1:2], data[2:3], data[3:]]:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
            threading.Event().wait(0.05)
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def served(folder: Path):
    """The address of an HTTP server of a folder on this machine."""
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def web(tmp_path, short_pauses):
    (tmp_path / "0.tar").write_bytes(TAR)
    (tmp_path / "0.tar.zst").write_bytes(PACKED["zstd"])
    with served(tmp_path) as address:
        yield address


@pytest.mark.parametrize("path", ["0.tar", "0.tar.zst", "0.tar?token=a"])
def test_a_shard_is_read_over_http(web, path):
    urls = expand_shards(f"{web}/{path}")
    assert urls == [f"{web}/{path}"]
    members, end = sample_bytes(urls[0])
    assert members == PAIRS
    assert end.num_bytes == len(PACKED["zstd"] if "zst" in path else TAR)


def test_a_missing_shard_over_http_is_a_shard_error(web):
    [url] = expand_shards(f"{web}/missing.tar")
    with pytest.raises(ShardError, match="can't open it: there is no such file"):
        read_all(url)


def test_a_server_that_is_not_there_is_a_shard_error(tmp_path, short_pauses):
    with served(tmp_path) as address:
        pass
    with pytest.raises(ShardError, match="can't open it"):
        read_all(f"{address}/0.tar")


def test_a_body_cut_short_of_its_length_is_a_shard_error_and_never_a_short_shard(web):
    with pytest.raises(ShardError, match=r"reading failed|connection ended"):
        sample_bytes(f"{web}/short/0.tar")


@pytest.mark.parametrize("name", ["0.tar", "0.tar.zst"])
def test_a_body_that_comes_in_small_pieces_without_a_length_is_read_whole(web, name):
    members, end = sample_bytes(f"{web}/streamed/{name}")
    assert members == PAIRS
    assert end.num_bytes == -1


def test_a_large_shard_is_read_from_a_server_without_range_requests(tmp_path):
    """Such as `python -m http.server`."""
    members = [(f"{key}.{ext}", bytes([key]) * (1 << 20)) for key in range(6) for ext in ("jpg", "txt")]
    write_tar(tmp_path / "large.tar", members)
    with served(tmp_path) as address:
        assert sample_bytes(f"{address}/large.tar")[0] == members


def test_a_shard_that_shrinks_while_it_is_read_is_a_shard_error_with_the_position(tmp_path):
    path = write_shard(tmp_path / "0.tar", [{"jpg": os.urandom(1 << 20), "txt": b"x"}] * 3)
    with open_shard(f"file://{path}") as shard:
        os.truncate(path, 1 << 20)
        with pytest.raises(ShardError, match=r"after 1048576 of \d+ bytes; try again"):
            shard.stream.read()
