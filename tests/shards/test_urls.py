import importlib.util
import os
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

from clipfilter_wds.shards.names import shard_folder
from clipfilter_wds.shards.open import shard_identity
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.types import ShardError
from tests.support.toys import read_whole, tar_bytes


def names_of(urls: list[str]) -> list[str]:
    return [os.path.relpath(url) for url in urls]


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
        ("000.tar::sub/a.tar", ["000.tar", "sub/a.tar"]),
        ("00{1,0}.tar::sub/*.tar::002.tar", ["001.tar", "000.tar", "sub/a.tar", "sub/b.tar", "002.tar"]),
        ("000.tar, 001.tar :: 002.tar,", ["000.tar", "001.tar", "002.tar"]),
        ("{000.tar::001,sub/a}.tar", ["000.tar", "001.tar", "sub/a.tar"]),
        ("::000.tar::", ["000.tar"]),
        ("01?.tar", ["010.tar", "011.tar"]),
        ("00[13].tar", ["001.tar", "003.tar"]),
        ("sub/*.tar,000.tar", ["sub/a.tar", "sub/b.tar", "000.tar"]),
        ("sub/**/*.tar", ["sub/a.tar", "sub/b.tar", "sub/deep/c.tar"]),
        ("{sub,sub/deep}/*.tar", ["sub/a.tar", "sub/b.tar", "sub/deep/c.tar"]),
        (["001.tar", "{000..001}.tar"], ["001.tar", "000.tar"]),
        ([Path("sub/a.tar"), "sub/b.tar"], ["sub/a.tar", "sub/b.tar"]),
        (("000.tar",), ["000.tar"]),
        ("sub", ["sub/a.tar", "sub/b.tar"]),
        ("sub/,000.tar", ["sub/a.tar", "sub/b.tar", "000.tar"]),
        ("{sub,sub/deep}", ["sub/a.tar", "sub/b.tar", "sub/deep/c.tar"]),
        ([Path("sub"), "sub/a.tar"], ["sub/a.tar", "sub/b.tar"]),
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
        ["000.tar", lambda: Path("000.tar").absolute().as_uri()],
        "000.tar::000.tar",
    ],
)
def test_a_shard_that_is_named_twice_in_any_way_is_read_once(folder, shards):
    shards = [item() if callable(item) else item for item in shards] if isinstance(shards, list) else shards
    urls = expand_shards(shards)
    assert len({Path(url).resolve() for url in urls}) == len(urls)


@pytest.mark.parametrize(
    "name",
    [
        *("a,b.tar", "x[1].tar", "a{b.tar", "{0..3}.tar", "w*.tar", "w?.tar", "@x.tar", "ü ñ.tar", "#.tar"),
        *("a::b.tar", "::.tar", "simplecache::x.tar", "file:x.tar", "local:x.tar", "s3:x.tar", "~x.tar"),
        *("a\\b.tar", "\udcff.tar", "a\nb.tar", " .tar", "\x1b[31m.tar", "x" * 251 + ".tar"),
    ],
)
@pytest.mark.parametrize("spell", [str, Path, lambda name: [name], lambda name: str(Path(name).absolute())])
def test_a_file_that_is_there_is_meant_as_it_is_written(tmp_path, monkeypatch, name, spell):
    monkeypatch.chdir(tmp_path)
    Path("wild.tar").touch()
    Path(name).write_bytes(tar_bytes([("a.jpg", b"1")]))
    [url] = expand_shards(spell(name))
    assert Path(url).resolve() == Path(name).resolve()
    assert read_whole(url) == Path(name).read_bytes()


@pytest.mark.parametrize(
    "name", ["a,b", "run[1]", "{0..3}", "a{b", "w*", "@x", "a::b", "simplecache::x", "~x", "a, b/c,d"]
)
def test_a_folder_that_exists_is_taken_as_its_name_stands(folder, name):
    Path(name).mkdir(parents=True)
    for shard in ("1.tar", "0,{a}.tar"):
        (Path(name) / shard).touch()
    for spelled in (name, f"{name}/", str(folder / name)):
        assert expand_shards(spelled) == [f"{spelled.rstrip('/')}/{shard}" for shard in ("0,{a}.tar", "1.tar")]


def test_a_list_file_names_one_pattern_per_line(folder):
    Path("list.txt").write_text("# comment\n000.tar\n\n  sub/*.tar  \n{001..002}.tar\n000.tar\n#003.tar\n")
    expected = ["000.tar", "sub/a.tar", "sub/b.tar", "001.tar", "002.tar"]
    assert names_of(expand_shards("@list.txt")) == expected
    assert names_of(expand_shards(["011.tar", "@list.txt"])) == ["011.tar", *expected]
    assert names_of(expand_shards("@" + str(folder / "list.txt"))) == expected
    for pattern in ("@list.txt,011.tar", "@list.txt::011.tar", "{@list.txt,011.tar}", "@{list.txt,second.txt}"):
        Path("second.txt").write_text("011.tar")
        assert names_of(expand_shards(pattern)) == [*expected, "011.tar"]


def test_a_list_may_come_from_another_command(folder):
    with subprocess.Popen(["echo", "00[01].tar"], stdout=subprocess.PIPE) as process:
        assert names_of(expand_shards(f"@/dev/fd/{process.stdout.fileno()}")) == ["000.tar", "001.tar"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_file_may_have_a_byte_order_mark_and_be_in_the_home_folder(folder, monkeypatch, encoding):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "list.txt").write_bytes("000.tar\r\n001.tar\r\n".encode(encoding))
    assert names_of(expand_shards("@~/list.txt")) == ["000.tar", "001.tar"]


def test_a_list_file_in_another_encoding_is_refused_with_its_name(folder):
    (folder / "list.txt").write_bytes(b"na\xefve.tar\n")
    with pytest.raises(ValueError, match=r"list of shards '.*list\.txt' is no text: .*; save it as UTF-8"):
        expand_shards(f"@{folder / 'list.txt'}")


def test_a_list_file_may_name_files_whose_names_are_no_text(folder):
    names = [b"000.tar", b"caf\xe9.tar", "ü.tar".encode()]
    for name in names[1:]:
        (folder / os.fsdecode(name)).touch()
    (folder / "list.txt").write_bytes(b"\n".join(names))
    assert [os.fsencode(url) for url in expand_shards("@list.txt")] == names
    (folder / "list.txt").write_bytes(b"\n".join([*names, b"na\xefve.tar"]))
    with pytest.raises(ValueError, match="is no text"):
        expand_shards("@list.txt")


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "no shard matches an empty list"),
        ("", "no shard matches an empty text"),
        (["000.tar", ""], "no shard matches an empty text"),
        (",", "no shard matches ','"),
        ("nothing*.tar", r"no shard matches 'nothing\*.tar'"),
        (["nothing*.tar", "x?.tar"], r"no shard matches 'nothing\*.tar'"),
        ("missing.tar", "'missing.tar': there is no such file"),
        (["000.tar", "missing.tar"], "'missing.tar': there is no such file"),
        ("{010..012}.tar", "'012.tar': there is no such file"),
        ("000.tar::missing.tar", "'missing.tar': there is no such file"),
        ("000.tar::missing*.tar", "no shard matches 'missing[*].tar'"),
        ("zip://000.tar::archive.zip", "'zip://000.tar' is a file within an archive; unpack that"),
        ("000.tar::zip://000.tar::archive.zip", "'zip://000.tar' is a file within an archive"),
        ("simplecache::zip://000.tar::archive.zip", "'zip://000.tar' is a file within an archive"),
        ("tar://000.tar", "'tar://000.tar' is a file within an archive"),
        ("simplecache::000.tar", "'simplecache::000.tar' is on this machine already; name it without simplecache::"),
        ("000::001.tar", "there is no such file"),
        ("data::001.tar", "'data::001.tar': data:: is not known; the cache that is, is simplecache::"),
        ("filecache::000.tar", "may deliver wrong bytes; use simplecache::"),
        ("simplecache::data::memory://x/0.tar", "simplecache::data:: is not known"),
        ("{000..", "is not a brace range like {00000..00999}"),
        ("{000..003.tar", "is not a brace range like {00000..00999}"),
        ("000}.tar", "is not a brace range like {00000..00999}"),
        ("{0..1000000000}.tar", "stands for 1,000,000,001 shards; is 1000000000 what was meant?"),
        ("{a,{b,c}.tar", "is not a brace range like {00000..00999}"),
        ("@missing.txt", "can't read the list of shards 'missing.txt': No such file"),
        ("@sub", "can't read the list of shards 'sub': Is a directory"),
        ("@itself.txt", "the list of shards 'itself.txt' names itself"),
        ("@empty.txt", "no shard matches '@empty.txt'"),
        ("@memory://list.txt", "the list of shards 'memory://list.txt' is not on this machine; copy it here"),
    ],
)
def test_what_names_no_shard_is_an_error_that_says_so(folder, shards, message):
    Path("empty.txt").write_text("# nothing\n\n")
    Path("bare/folder.tar.d").mkdir(parents=True)
    Path("bare/0.tar.part").touch()
    Path("itself.txt").write_text("000.tar\n@itself.txt\n")
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        expand_shards(shards)


@pytest.mark.parametrize(
    "shards", ["pipe:cat 000.tar", ["000.tar", "pipe:cat 000.tar"], "000.tar,pipe:cat 000.tar", "@list.txt"]
)
def test_a_pipe_is_refused_wherever_it_stands(folder, shards):
    Path("list.txt").write_text("000.tar\npipe:cat 000.tar\n")
    cure = "would run a shell command; pass allow_pipe=True .* Python takes. The commands run none"
    with pytest.raises(ValueError, match=cure):
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
    assert expand_shards(f"file://{folder}/sub") == [
        f"file://{path}" for path in sorted((folder / "sub").glob("*.tar"))
    ]
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
    assert shard_identity(urls[0]).num_bytes == len(data)
    for url in [*urls, *expand_shards("memory://x/**/2.tar")]:
        assert read_whole(url) == data


def test_sources_on_other_storages_are_joined_too(memory):
    for name in ("0.tar", "1.tar"):
        memory.pipe(f"/x/{name}", b"")
    assert expand_shards("simplecache::memory:///x/*.tar::http://[::1]:9/0.tar::memory://y/{0..1}.tar") == [
        "simplecache::memory:///x/0.tar",
        "simplecache::memory:///x/1.tar",
        "http://[::1]:9/0.tar",
        "memory://y/0.tar",
        "memory://y/1.tar",
    ]
    assert expand_shards("memory:///x/0.tar::pipe:curl http://[::1]/a.tar::b", allow_pipe=True)[1:] == [
        "pipe:curl http://[::1]/a.tar::b"
    ]
    with pytest.raises(ValueError, match="would run a shell command"):
        expand_shards("memory:///x/0.tar::pipe:cat 0.tar")


def test_brackets_of_the_working_folder_are_no_glob(folder, monkeypatch):
    (folder / "set[1]").mkdir()
    (folder / "set[1]" / "0.tar").touch()
    monkeypatch.chdir(folder / "set[1]")
    assert names_of(expand_shards("*.tar")) == ["0.tar"]


def test_a_missing_shard_of_another_storage_is_an_error_when_it_is_opened(memory):
    [url] = expand_shards("memory://missing.tar")
    with pytest.raises(ShardError, match="there is no such file"):
        read_whole(url)


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_storage_whose_package_is_missing_names_the_pip_command(scheme, package, extra):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    command = rf"pip install 'clipfilter-wds\[{extra}\]'"
    with pytest.raises(ValueError, match=command):
        expand_shards(f"{scheme}://bucket/{{000..003}}.tar")
    with pytest.raises(ShardError, match=command):
        read_whole(f"{scheme}://bucket/000.tar")


def test_an_unknown_scheme_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="nonsense"):
        expand_shards("nonsense://bucket/000.tar")
