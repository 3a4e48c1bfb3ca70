import posixpath
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from clipfilter_wds.shards.names import output_names, public_url, shard_name


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
        ("a\\b.tar", "a\\b"),
        ("a\udcff.tar", "a\\udcff"),
        ("s3://b/a#1.tar", "a#1"),
        ("s3://b/a?1.tar", "a?1"),
        ("s3://b/a::b.tar", "a::b"),
        ("simplecache::s3://b/a.tar", "a"),
        ("file:///x/a?b#c.tar", "a?b#c"),
        ("x/a::b.tar", "a::b"),
        ("x" * 237 + ".tar", "x" * 237),
        ("pipe:cat /data/000.tar", "000"),
    ],
)
def test_a_shard_is_named_after_its_file(url, name):
    assert shard_name(url) == name


@pytest.mark.parametrize("url", ["", "a/", "..", "a/..", "/", ".tar", "a/.tar.gz", "...tar", "a\0.tar"])
def test_a_shard_without_a_base_name_is_refused(url):
    with pytest.raises(ValueError, match="no base name"):
        shard_name(url)


@pytest.mark.parametrize("url", ["s3://bucket/a/", "simplecache::s3://bucket/", "https://user:secret@host/"])
def test_a_folder_on_other_storage_is_refused_with_how_to_name_its_shards(url):
    shown = url.replace("user:secret@", "")
    with pytest.raises(ValueError, match=re.escape(f"'{shown}' is a folder; name its shards: {shown}*.tar")):
        shard_name(url)


@pytest.mark.parametrize("name", ["x" * 238, "ü" * 119])
def test_a_shard_whose_outputs_would_have_too_long_a_name_is_refused(name):
    with pytest.raises(ValueError, match="has a name of 238 bytes, and outputs are named after it; give it one of 237"):
        shard_name(f"/data/{name}.tar")


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


@settings(max_examples=400)
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
