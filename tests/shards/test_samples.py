import io
import tarfile

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.types import DropReason, ShardEnd, ShardError
from tests.support.tars import (
    BLOCK,
    END,
    FORMATS,
    PAIR_A,
    PAIR_B,
    SHARDS,
    check_accounting,
    content,
    each_format,
    plain,
)
from tests.support.toys import raw_member, read_shard, tar_bytes

# --- whole shards ---


@each_format
def test_a_whole_shard_yields_its_samples_and_all_of_their_members_in_order(tar_format):
    shard = SHARDS[tar_format]
    samples, end = read_shard(shard.data)
    assert plain(samples) == shard.samples
    assert [member.name for sample in samples for member in sample.members] == list(shard.contents)
    assert end == ShardEnd(num_samples=5, torn=False, num_bytes=len(shard.data), signature=end.signature)
    check_accounting(samples, end)


@pytest.mark.parametrize("num_blocks", [1, 2, 20, 21])
def test_an_archive_of_nothing_but_its_end_mark_is_empty_and_whole(num_blocks):
    samples, end = read_shard(bytes(BLOCK * num_blocks))
    assert samples == []
    assert (end.num_samples, end.torn, end.num_bytes) == (0, False, BLOCK * num_blocks)


def test_an_empty_file_is_torn_and_holds_no_sample():
    samples, end = read_shard(b"")
    assert samples == []
    assert (end.num_samples, end.torn, end.num_bytes) == (0, True, 0)


@pytest.mark.parametrize("size", [1, 100, BLOCK, 5000])
def test_a_file_that_is_no_tar_is_an_error(size):
    with pytest.raises(ShardError, match="not a tar archive"):
        read_shard(content("<html>404 not found</html>", size))


# --- grouping ---


name_alphabet = st.sampled_from(list("ab._-/ é\udcff"))

names = st.text(name_alphabet, min_size=1, max_size=12).map(lambda name: name + ".jpg") | st.text(name_alphabet).filter(
    bool
)


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


@settings(max_examples=300)
@given(names.filter(lambda name: not is_hidden(name) and name.rpartition("/")[2] and not name.startswith("__")))
def test_key_and_extension_of_a_name_are_those_of_webdataset(name):
    samples, end = read_shard(tar_bytes([(name, b"x")], encoding="utf-8", errors="surrogateescape"))
    key, extension = base_plus_ext(name)
    if key is None:
        assert end.num_samples == 0
    else:
        assert samples[0].key == key.encode("utf-8", "backslashreplace").decode()
        assert samples[0].members[0].extension == extension
        assert samples[0].members[0].name == name


member_names = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "a/", "b/", "b.c/", "__meta__/"]),
    st.sampled_from(["0", "1", "2 x", "__y__"]),
    st.sampled_from(["jpg", "txt", "JSON", "seg.png", ""]),
)


@settings(max_examples=200)
@given(st.lists(member_names, unique_by=str.lower, max_size=10).map(sorted))
def test_a_sorted_shard_is_grouped_as_webdataset_groups_it(member_names):
    data = tar_bytes([(name, name.encode()) for name in member_names])
    theirs = [
        (sample["__key__"], {ext: value for ext, value in sample.items() if not ext.startswith("__")})
        for sample in group_by_keys({**file, "__url__": ""} for file in tar_file_iterator(io.BytesIO(data)))
    ]
    assert plain(read_shard(data)[0]) == theirs


@pytest.mark.parametrize("name", ["A.JPG", "A.Jpg", "dir.with.dots/A.JPEG"])
def test_an_upper_case_extension_is_read_in_lower_case_and_the_name_kept(name):
    [sample], _ = read_shard(tar_bytes([(name, b"x"), (name.partition("A.")[0] + "A.TXT", b"y")]))
    assert [member.extension for member in sample.members] == [name.rpartition(".")[2].lower(), "txt"]
    assert sample.members[0].name == name


@pytest.mark.parametrize(
    "name", ["0000", ".jpg", ".hidden.jpg", "a/.jpg", "a/._0000.jpg", "__meta__", "__meta__/0000.json", "a.b/0000"]
)
def test_names_without_key_or_extension_and_meta_names_are_passed_over(name):
    data = tar_bytes([("0000.jpg", b"image"), (name, b"noise"), ("0000.txt", b"caption")])
    samples, end = read_shard(data)
    assert plain(samples) == [("0000", {"jpg": b"image", "txt": b"caption"})]
    assert end.num_samples == 1


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("target", ["/etc/hostname", "0000.txt", "../../etc/hostname"])
def test_links_devices_and_folders_are_passed_over_and_never_followed(kind, target):
    info = tarfile.TarInfo("0000.jpg")
    info.type, info.linkname = kind, target
    samples, end = read_shard(raw_member(info) + tar_bytes([("0000.txt", b"caption")]))
    assert plain(samples) == [("0000", {"txt": b"caption"})]
    assert not end.torn


@pytest.mark.parametrize("old", [tarfile.AREGTYPE, tarfile.CONTTYPE])
def test_the_other_kinds_of_regular_members_are_read(old):
    info = tarfile.TarInfo("0000.jpg")
    info.type, info.size = old, 5
    samples, _ = read_shard(raw_member(info, b"image") + END)
    assert plain(samples) == [("0000", {"jpg": b"image"})]


@pytest.mark.parametrize("between", [[], PAIR_B], ids=["adjacent", "apart"])
def test_a_key_with_two_whole_samples_is_two_samples(between):
    again = [("a.jpg", b"5"), ("a.txt", b"6")]
    samples, end = read_shard(tar_bytes([*PAIR_A, *between, *again]))
    groups = [PAIR_A, *([between] if between else []), again]
    assert [[(member.name, member.data) for member in sample.members] for sample in samples] == groups
    check_accounting(samples, end)


@pytest.mark.parametrize(
    "members",
    [
        [("a.jpg", b""), *PAIR_B, ("a.txt", b"")],
        [("a.txt", b""), *PAIR_B, ("a.jpg", b"")],
        [*PAIR_A, *PAIR_B, ("a.jpg", b"")],
        [("a.jpg", b""), *PAIR_B, *PAIR_A],
        [("a.jpg", b""), ("a.jpg", b""), ("a.txt", b"")],
        [("a.jpg", b""), ("a.txt", b""), ("a.txt", b"")],
        [("a.jpg", b""), ("a.JPG", b""), ("a.txt", b"")],
    ],
    ids=["image first", "caption first", "whole then part", "part then whole", "image twice", "caption twice", "case"],
)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_key_that_comes_back_incomplete_is_an_error_that_names_key_and_cure(members, wanted):
    with pytest.raises(ShardError, match=r"not sorted: members of 'a' .*tar --sort=name"):
        read_shard(tar_bytes([*members, ("z.jpg", b""), ("z.txt", b"")]), wanted=lambda index: wanted)


def test_images_in_one_half_and_captions_in_the_other_are_an_error_and_not_missing_captions():
    members = [(f"{key:03d}.{ext}", b"") for ext in ("jpg", "txt") for key in range(20)]
    with pytest.raises(ShardError, match="'000'"):
        read_shard(tar_bytes(members))


def test_a_json_caption_counts_as_the_caption_of_a_repeated_key():
    members = [("a.jpg", b"1"), ("a.json", b"{}"), *PAIR_B, ("a.jpg", b"2"), ("a.json", b"{}")]
    _, end = read_shard(tar_bytes(members), SampleLayout(caption="json:caption"))
    assert end.num_samples == 3
    with pytest.raises(ShardError, match="not sorted"):
        read_shard(tar_bytes(members))


# --- odd names ---


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
@pytest.mark.parametrize("length", [99, 100, 101, 255, 256, 5000])
def test_long_names_are_read_whole(tar_format, length):
    name = "d/" * 40 + "x" * (length - 84) + ".jpg"
    samples, _ = read_shard(tar_bytes([(name, b"data")], format=FORMATS[tar_format]))
    assert [member.name for member in samples[0].members] == [name]


def test_names_that_are_not_utf8_are_grouped_by_their_bytes_and_escaped_in_the_key():
    odd = [b"\xff\xfe".decode("utf-8", "surrogateescape"), b"\xff\xfd".decode("utf-8", "surrogateescape")]
    members = [(f"{key}.{ext}", f"{number}{ext}".encode()) for number, key in enumerate(odd) for ext in ("jpg", "txt")]
    samples, end = read_shard(tar_bytes(members, format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"))
    assert [sample.key for sample in samples] == ["\\udcff\\udcfe", "\\udcff\\udcfd"]
    assert [(member.name, member.data) for sample in samples for member in sample.members] == members
    assert end.num_samples == 2


def test_pax_names_are_read_as_utf8():
    name = "画像/Ünïcode 🐈.jpg"
    samples, _ = read_shard(tar_bytes([(name, b"")], format=tarfile.PAX_FORMAT))
    assert samples[0].key == "画像/Ünïcode 🐈"


# --- limits and layout ---


@pytest.mark.parametrize("extension", ["jpg", "txt", "npy"])
@pytest.mark.parametrize(("wanted", "pair_only"), [(True, False), (True, True), (False, False)])
def test_only_a_sample_with_a_member_over_the_cap_is_too_large(extension, wanted, pair_only):
    sizes = {"jpg": 1000, "txt": 1000, "npy": 1000}
    large = {**sizes, extension: 1001}
    members = [
        (f"{key}.{ext}", bytes(size))
        for key, all_ in ((1, sizes), (2, large), (3, sizes))
        for ext, size in all_.items()
    ]
    layout = SampleLayout(max_member_bytes=1000)
    samples, end = read_shard(tar_bytes(members), layout, wanted=lambda index: wanted, pair_only=pair_only)
    assert end == ShardEnd(num_samples=3, torn=False, num_bytes=end.num_bytes, signature=end.signature)
    if wanted:
        assert [sample.problem for sample in samples] == [None, DropReason.MEMBER_TOO_LARGE, None]
        assert [len(sample.members) for sample in samples] == ([2, 0, 2] if pair_only else [3, 0, 3])


def test_a_torn_sample_with_a_member_over_the_cap_is_torn():
    info = tarfile.TarInfo("a.jpg")
    info.size = 5000
    [sample], _ = read_shard(raw_member(info, bytes(2000)), SampleLayout(max_member_bytes=1000))
    assert sample.problem is DropReason.TORN


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
@pytest.mark.parametrize("cap", [1, 100, 600])
def test_a_cap_on_members_is_no_cap_on_headers(tar_format, cap):
    data = tar_bytes([("long/" * 300 + "a.jpg", b""), ("b.txt", b"b")], format=FORMATS[tar_format])
    samples, end = read_shard(data, SampleLayout(max_member_bytes=cap))
    assert [sample.problem for sample in samples] == [None, None]
    assert not end.torn


@pytest.mark.parametrize("caption", ["", ".", ":caption", "json:", ":"])
def test_a_layout_without_caption_member_or_field_is_refused(caption):
    with pytest.raises(ValueError, match=f"caption is {caption!r}; name a member"):
        SampleLayout(caption=caption)


@pytest.mark.parametrize(
    ("caption", "extension", "field"),
    [
        ("txt", "txt", None),
        (".TXT", "txt", None),
        ("json:caption", "json", "caption"),
        ("json:a:b", "json", "a:b"),
        ("alt.txt", "alt.txt", None),
    ],
)
def test_a_layout_names_the_caption_member_and_its_field(caption, extension, field):
    layout = SampleLayout(caption=caption)
    assert layout.caption_sources == [(extension, field)]
    assert layout.text_extensions == {extension, "json"}


@pytest.mark.parametrize("image", ["", " ", ",", "jpg,", "jpg;png", "jpg png", "a/jpg", "json:image"])
def test_a_layout_whose_image_is_no_extension_is_refused(image):
    with pytest.raises(ValueError, match=f"image is {image!r}; name extensions, separated by commas"):
        SampleLayout(image=image)


@pytest.mark.parametrize(("image", "caption"), [("x.jpg", "x.JPG"), (None, "png"), ("json,png", "json:caption")])
def test_a_member_that_is_to_be_image_and_caption_is_refused(image, caption):
    with pytest.raises(ValueError, match="caption and image are both '"):
        SampleLayout(image=image, caption=caption)


def test_a_layout_names_the_images_best_first():
    assert SampleLayout(image=".Input.JPG, png").image_extensions == ("input.jpg", "png")
    assert SampleLayout().image_extensions[0] == "jpg"
    assert "jfif" in SampleLayout().image_extensions


layouts = st.builds(
    SampleLayout,
    caption=st.sampled_from(["txt", "json:a.b", "alt.txt,txt"]),
    image=st.none() | st.sampled_from(["input.jpg", "png,webp"]),
    max_member_bytes=st.integers(1, 1 << 30),
    max_text_bytes=st.sampled_from([1 << 10, 1 << 22]),
)


@given(layouts)
def test_a_fingerprint_tells_the_layout_and_that_of_the_usual_one_does_not_change(layout):
    fingerprint = layout.fingerprint
    assert SampleLayout.from_fingerprint({"model": "a", **fingerprint}) == layout
    assert ("image" in fingerprint, "max_text_bytes" in fingerprint) == (
        layout.image is not None,
        layout.max_text_bytes != 1 << 22,
    )
    assert SampleLayout().fingerprint == {"caption": "txt", "max_member_bytes": 1 << 28}


# --- what is read of a sample to score it ---


@given(st.permutations(["png", "jpg", "webp", "txt", "npy", "json", "input.jpg"]), st.integers(0, 5))
def test_of_several_images_the_best_is_read_and_of_text_no_more_than_may_be(extensions, max_text_bytes):
    data = tar_bytes([(f"a.{extension}", extension.encode() + b"12345") for extension in extensions])
    layout = SampleLayout(image="input.jpg,webp,jpg", max_text_bytes=max_text_bytes)
    [(_, members)] = plain(read_shard(data, layout, pair_only=True)[0])
    text = {extension: (extension.encode() + b"12345")[: max_text_bytes + 1] for extension in ("txt", "json")}
    assert members == {"input.jpg": b"input.jpg12345", **text}
    assert list(members) == [extension for extension in extensions if extension in members]
    [(_, members)] = plain(read_shard(data, layout)[0])
    assert members == {extension: extension.encode() + b"12345" for extension in extensions}


@pytest.mark.parametrize("others", [("cls", "seg.png", "txt"), None])
def test_other_members_are_read_beside_the_pair(others):
    members = [("a.png", b"1"), ("a.seg.png", b"2"), ("a.txt", b"long caption"), ("a.cls", b"3"), ("a.jpg", b"4")]
    layout = SampleLayout(others=others, max_text_bytes=4)
    [sample], _ = read_shard(tar_bytes([*members, ("a.mp4", b"5")]), layout, pair_only=True)
    found = {member.extension: member.data for member in sample.members}
    expected = {"seg.png": b"2", "txt": b"long ", "cls": b"3", "jpg": b"4"}
    assert found == (expected if others else {**expected, "png": b"1", "mp4": b"5"})
