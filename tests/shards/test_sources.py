"""What is read and what it is called are the same file, however shards are named."""

from itertools import chain

import fsspec
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from clipfilter_wds.shards.names import output_names, public_url, shard_name
from clipfilter_wds.shards.urls import expand_shards
from tests.support.toys import read_whole

REMOTE = "memory:///sources"
PLAIN = [f"{folder}/{number}.tar" for folder in ("a", "b") for number in range(3)]
#: Names that mean something else where no file has them.
ODD = ["x,y.tar", "x::y.tar", "[0].tar", "{0,1}.tar", "?.tar", "*.tar", "0\\1.tar", "0 1.tar", "@0.tar", "s3:x.tar"]
ODD += ["simplecache::0.tar", "file:0.tar", "~0.tar", "\udcff.tar", "0\n1.tar", "0#1.tar", "0%20.tar", "pip.tar"]


#: Ways to write some of the shards, without the folder, and which they are.
WRITTEN = [
    *((name, [name]) for name in PLAIN),
    ("a/{0,2}.tar", ["a/0.tar", "a/2.tar"]),
    ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
    ("{b/{2,1},a/0}.tar", ["b/2.tar", "b/1.tar", "a/0.tar"]),
    ("?/1.tar", ["a/1.tar", "b/1.tar"]),
    ("b/*.tar", ["b/0.tar", "b/1.tar", "b/2.tar"]),
    ("**/[02].tar", ["a/0.tar", "a/2.tar", "b/0.tar", "b/2.tar"]),
    ("{a/*,b/1}.tar", ["a/0.tar", "a/1.tar", "a/2.tar", "b/1.tar"]),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder whose files, and those of the same names in memory, hold what they are called."""
    folder, fs = tmp_path_factory.mktemp("here"), fsspec.filesystem("memory")
    for name in (*PLAIN, *(f"odd/{name}" for name in ODD)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(public_url(f"{folder}/{name}").encode())
    for number, (text, _) in enumerate(WRITTEN):
        (folder / f"{number}.txt").write_text(f"{folder}/{text}\n")
    for name in PLAIN:
        fs.pipe(f"/sources/{name}", f"{REMOTE}/{name}".encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "simplecache", {"cache_storage": str(tmp_path_factory.mktemp("cache"))})
        yield str(folder)
    fs.rm("/sources", recursive=True)


#: Where they are: ``list`` stands for a file that names those that are here.
places = st.sampled_from(["here", "list", REMOTE, f"simplecache::{REMOTE}"])
one = st.tuples(places, st.sampled_from(WRITTEN))
#: Several in braces are one pattern.
in_braces = st.lists(one, min_size=2, max_size=3)
patterns = st.lists(one.map(lambda found: [found]) | in_braces, min_size=1, max_size=4)
separators = st.lists(st.sampled_from([",", "::", ", ", " :: ", ",,", "::,"]), min_size=4, max_size=4)
items = st.lists(st.tuples(patterns, separators) | st.sampled_from(ODD), min_size=1, max_size=4)


def spell(patterns, separators, here: str) -> tuple[str, list[str]]:
    """A text that joins patterns, and what the shards are called that it stands for."""
    texts, names = [], []
    for alternatives in patterns:
        in_place = [(here if place in ("here", "list") else place, shards) for place, (_, shards) in alternatives]
        each = [
            f"@{here}/{WRITTEN.index(written)}.txt" if place == "list" else f"{in_which}/{written[0]}"
            for (place, written), (in_which, _) in zip(alternatives, in_place, strict=True)
        ]
        texts.append(each[0] if len(each) == 1 else "{" + ",".join(each) + "}")
        names += [f"{place.removeprefix('simplecache::')}/{shard}" for place, shards in in_place for shard in shards]
    return "".join(chain(*zip(texts, [*separators[: len(texts) - 1], ""], strict=True))), names


@settings(max_examples=200)
@given(items=items, as_file=st.booleans())
def test_what_is_read_is_what_is_named_for_any_mixture(here, tmp_path_factory, items, as_file):
    texts, expected = [], []
    for item in items:
        text, names = (f"{here}/odd/{item}", [f"{here}/odd/{item}"]) if isinstance(item, str) else spell(*item, here)
        texts.append(text)
        expected += [public_url(name) for name in names]
    if as_file and not any("\n" in text or "\udcff" in text for text in texts):
        path = tmp_path_factory.getbasetemp() / "list.txt"
        path.write_text("\n".join(texts))
        texts = [f"@{path}"]
    urls = expand_shards(texts)
    called = [public_url(url) for url in urls]
    assert called == list(dict.fromkeys(expected))
    assert [read_whole(url).decode() for url in urls] == called
    assert [shard_name(url) for url in urls] == [name.rpartition("/")[2].removesuffix(".tar") for name in called]
    try:
        names = output_names(urls)
    except ValueError as error:
        assert "would both be written" in str(error)  # noqa: PT017
    else:
        assert all(call.removesuffix(".tar").endswith(name) for call, name in zip(called, names.values(), strict=True))


def test_objects_of_any_name_that_a_glob_finds_are_read_and_named(s3, short_pauses):
    s3.reset()
    fs, names = (
        fsspec.filesystem("s3"),
        ["a::b", "a#1", "a#2", "a?b", "a%20b", "a b", "a\\b", "a,b", "a*b", "[0]", "{0}", "ü"],
    )
    for name in names:
        fs.pipe(f"bucket/odd/{name}.tar", name.encode())
    urls = expand_shards("s3://bucket/odd/*.tar")
    assert sorted(map(public_url, urls)) == sorted(f"s3://bucket/odd/{name}.tar" for name in names)
    assert {url: read_whole(url).decode() for url in urls} == output_names(urls)
