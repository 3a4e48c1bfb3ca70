"""What a run says where samples lack an image or a caption, or nothing is kept; and that what it says helps."""

import json
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from clipfilter_wds.offline.advice import advice
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.tally import ShardStats, Tally
from clipfilter_wds.preprocess.members import first_image, read_captions
from clipfilter_wds.shards.samples import IMAGE_EXTENSIONS, SampleLayout
from clipfilter_wds.types import DropReason, FilterStats, Sample, UnusableError
from tests.support.outputs import rewrite
from tests.support.toys import encoded, pair, photo, read_shard, tar_bytes, write_shard, write_tar

IMAGE, TEXT = encoded(photo(1)), b"a photo"
JSON = json.dumps({"url": "x", "meta": {"caption": "a photo"}}).encode()

#: Members of each sample, the options that are tried, and those that help.
MISNAMED = {
    "another name": ({"input.jpg": IMAGE, "outputs.txt": TEXT}, [], ["--image input.jpg", "--caption outputs.txt"]),
    "both named": ({"image.jpg": IMAGE, "caption.txt": TEXT}, [], ["--image image.jpg", "--caption caption.txt"]),
    "image named": ({"input.jpg": IMAGE, "txt": TEXT}, [], ["--image input.jpg"]),
    "another image": ({"jpg": IMAGE, "txt": TEXT}, ["--image", "png"], ["--image jpg"]),
    "typo": ({"jpg": IMAGE, "txt": TEXT}, ["--caption", "text"], ["--caption txt"]),
    "no such field": ({"jpg": IMAGE, "json": JSON}, ["--caption", "json:nosuch"], ["--caption json:meta.caption"]),
    "only json": ({"jpg": IMAGE, "json": JSON}, [], ["--caption json:meta.caption"]),
}


def write_samples(path: Path, members: dict[str, bytes], num_samples: int = 3) -> Path:
    return write_tar(path, [(f"{key}.{ext}", data) for key in range(num_samples) for ext, data in members.items()])


@pytest.mark.parametrize(("members", "options", "cure"), MISNAMED.values(), ids=MISNAMED)
def test_where_nothing_is_named_right_one_line_says_what_is_found_and_what_helps(
    command, clip_folder, tmp_path, members, options, cure
):
    shard = write_samples(tmp_path / "0.tar", members)
    code, said = rewrite(command, clip_folder, shard, tmp_path / "out", *options)
    [line] = re.findall(r"^3 of 3 samples lack .*$", said, re.MULTILINE)
    assert code == 0
    assert all(f"{extension} (3)" in line for extension in members)
    assert line.endswith(f"Name the right ones: {' '.join(cure)}")

    _, said = rewrite(command, clip_folder, shard, tmp_path / "cured", *" ".join(cure).split())
    assert re.search(r"^kept +3\b", said, re.MULTILINE)
    assert "lack" not in said


def test_two_images_and_no_text_ask_for_a_caption_too(command, clip_folder, tmp_path):
    shard = write_samples(tmp_path / "0.tar", {"0.jpg": IMAGE, "1.jpg": IMAGE})
    _, said = rewrite(command, clip_folder, shard, tmp_path / "out")
    assert "lack an image and a caption. Their members' extensions are 0.jpg (3), 1.jpg (3)." in said
    assert "--image 0.jpg --caption EXTENSION" in said


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ScoreConfig:
    folder = tmp_path_factory.mktemp("config")
    return ScoreConfig(shards=write_tar(folder / "in" / "0.tar", []), output=folder / "out")


words = st.text("abcxyz01_-", min_size=1, max_size=6)


@st.composite
def namings(draw) -> tuple[str, str | None, dict]:
    """The extensions of an image and a caption, or a field for it in a json, and its record."""
    image = draw(st.lists(words, max_size=2).map(lambda parts: [*parts, draw(st.sampled_from(IMAGE_EXTENSIONS))]))
    if draw(st.booleans()):
        text = draw(st.lists(words, max_size=2).map(lambda parts: [*parts, "txt"]))
        return ".".join(image), ".".join(text), {}
    record: object = "a photo"
    for name in reversed([*draw(st.lists(words, max_size=2)), draw(st.sampled_from(["caption", "text"]))]):
        record = {name: record}
    return ".".join(image), None, record


@settings(max_examples=100)
@given(namings())
def test_for_any_names_the_options_that_are_named_find_image_and_caption(config, naming):
    image, text, record = naming
    members = {image: b"image", **({text: b"a photo"} if text else {"json": json.dumps(record).encode()})}
    data = tar_bytes([(f"{key}.{ext}", content) for key in range(3) for ext, content in members.items()])
    samples, end = read_shard(data, config.layout, pair_only=True)
    reasons = Counter(filter(None, (lacks(sample, config.layout) for sample in samples)))
    stats = ShardStats(counts=FilterStats(seen=3, kept=3 - reasons.total(), dropped=reasons), members=end.members)
    tally = Tally(num_shards=1)
    tally.add(stats)
    options = dict(re.findall(r"--(image|caption) (\S+)", next(advice(tally, config), "")))
    assert bool(options) == bool(reasons)
    layout = SampleLayout(**options)
    assert not any(lacks(sample, layout) for sample in read_shard(data, layout, pair_only=True)[0])


def lacks(sample: Sample, layout: SampleLayout) -> DropReason | None:
    members = {member.extension: member.data for member in sample.members}
    try:
        first_image(members, layout)
        read_captions(members, layout)
    except UnusableError as unusable:
        return unusable.reason
    return None


def test_images_and_captions_in_folders_of_their_own_are_told_to_have_the_same_name(command, clip_folder, tmp_path):
    members = [(f"{folder}/{key}.{ext}", b"") for folder, ext in (("a", "jpg"), ("b", "txt")) for key in range(3)]
    _, said = rewrite(command, clip_folder, write_tar(tmp_path / "0.tar", members), tmp_path / "out")
    assert "6 of 6 samples lack an image or a caption. Their members' extensions are jpg (3), txt (3). " in said
    assert "An image and its caption have the same name, folders included, up to the first dot" in said


def test_keys_with_dots_are_told_to_have_none(command, clip_folder, tmp_path):
    members = [(f"a.{key:04d}.{ext}", b"") for key in range(20) for ext in ("jpg", "txt")]
    _, said = rewrite(command, clip_folder, write_tar(tmp_path / "0.tar", members), tmp_path / "out")
    assert "0000.jpg (1), 0000.txt (1), 0001.jpg (1), " in said
    assert "and 22 others. A key ends at a name's first dot: replace the dots in the keys" in said


def test_images_without_an_extension_are_told_of(command, clip_folder, tmp_path):
    members = [(f"{key}{ext}", b"") for key in range(3) for ext in ("", ".txt")]
    _, said = rewrite(command, clip_folder, write_tar(tmp_path / "0.tar", members), tmp_path / "out")
    assert "lack an image. Their members' extensions are none (3), txt (3). Name the right ones: --image EXT" in said


def test_one_shard_that_is_named_differently_is_told_of_and_again_when_the_run_is_resumed(
    command, clip_folder, tmp_path
):
    for number in range(2):
        write_shard(tmp_path / "in" / f"{number}.tar", [pair(i) for i in range(40)])
    write_samples(tmp_path / "in" / "2.tar", {"input.jpg": IMAGE, "txt": TEXT})
    for _ in range(2):
        code, said = rewrite(command, clip_folder, f"{tmp_path}/in/*.tar", tmp_path / "out")
        line = "in 1 of 3 shards, 3 of 3 samples lack an image. Their members' extensions are input.jpg (3), txt (3)."
        assert code == 0
        assert line in said.replace("\n", " ")
        assert "is kept" not in said


def test_some_samples_that_lack_one_are_only_counted(command, clip_folder, tmp_path):
    write_shard(tmp_path / "0.tar", [{"jpg": IMAGE}, {"txt": TEXT}, *[pair(i) for i in range(3)]])
    _, said = rewrite(command, clip_folder, tmp_path / "0.tar", tmp_path / "out")
    assert "missing_image" in said
    assert "samples lack" not in said
    assert "members" not in (tmp_path / "out" / "0_stats.json").read_text()


def test_hard_links_as_tar_writes_them_are_named(command, clip_folder, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for key in range(3):
        (files / f"{key}.txt").write_bytes(TEXT)
    (files / "0.jpg").write_bytes(IMAGE)
    (files / "1.jpg").hardlink_to(files / "0.jpg")
    (files / "2.jpg").symlink_to("0.jpg")
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "0.tar", "-C", files, "."], check=True)
    _, said = rewrite(command, clip_folder, tmp_path / "0.tar", tmp_path / "out")
    assert re.search(r"^kept +1\b", said, re.MULTILINE)
    [line] = re.findall(r"^links .*$", said, re.MULTILINE)
    assert line.startswith("links are passed over: jpg (2). GNU tar ")
    assert line.endswith("write the shards anew with `tar --dereference --hard-dereference`")

    cured = ["tar", "--sort=name", "--dereference", "--hard-dereference", "-cf"]
    subprocess.run([*cured, tmp_path / "1.tar", "-C", files, "."], check=True)
    _, said = rewrite(command, clip_folder, tmp_path / "1.tar", tmp_path / "cured")
    assert re.search(r"^kept +3\b", said, re.MULTILINE)
    assert "links are passed over" not in said


def test_where_all_images_are_links_no_option_is_named(command, clip_folder, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (tmp_path / "image").write_bytes(IMAGE)
    for key in range(2):
        (files / f"{key}.txt").write_bytes(TEXT)
        (files / f"{key}.jpg").symlink_to("../image")
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "0.tar", "-C", files, "."], check=True)
    _, said = rewrite(command, clip_folder, tmp_path / "0.tar", tmp_path / "out")
    assert "2 of 2 samples lack an image. Their members' extensions are txt (2). The others are links\n" in said
    assert "links are passed over: jpg (2)" in said

    subprocess.run(["tar", "-cf", tmp_path / "1.tar", "-C", files, "0.jpg", "1.jpg"], check=True)
    _, said = rewrite(command, clip_folder, tmp_path / "1.tar", tmp_path / "none")
    assert "links are passed over: jpg (2)" in said
    assert "the shards hold no sample" in said


def test_names_from_a_tar_are_harmless_on_a_terminal(command, clip_folder, tmp_path):
    shard = write_samples(tmp_path / "0.tar", {"\x1b[2Jx.jpg": IMAGE, "[red]y": TEXT})
    _, said = rewrite(command, clip_folder, shard, tmp_path / "out")
    assert "\x1b" not in said
    assert r"\x1b[2jx.jpg (3), [red]y (3)" in said


def test_tables_that_do_not_tell_the_names_of_members_are_told_of(config):
    tally = Tally(num_shards=1)
    tally.add(ShardStats(counts=FilterStats(seen=2, dropped={DropReason.MISSING_IMAGE: 2})))
    line, _ = advice(tally, config)
    assert "2 of 2 samples lack an image and a caption. Their score tables don't tell the names of members" in line


# --- nothing kept ---


def test_a_run_that_keeps_nothing_ends_with_the_reasons_the_most_frequent_first(command, clip_folder, tmp_path):
    samples = [{"jpg": b"no image", "txt": TEXT}, *[pair(i) for i in range(3)], {"jpg": IMAGE, "txt": b" "}]
    write_shard(tmp_path / "0.tar", [*samples, {"jpg": IMAGE, "txt": b""}])
    output = tmp_path / "out"
    _, said = rewrite(command, clip_folder, tmp_path / "0.tar", output, "--threshold", "0.999")
    assert said.rstrip().splitlines()[-1] == (
        "none of 6 samples is kept: 3 below_threshold, 2 blank_caption, 1 unreadable_image. The threshold is 0.999; "
        f"`clipfilter-wds report {output} --output report.html` shows what others would keep"
    )
    code, _ = command("report", output, "--output", tmp_path / "report.html")
    assert code == 0


def test_a_score_run_that_can_score_nothing_says_so(command, clip_folder, tmp_path):
    write_shard(tmp_path / "0.tar", [{"jpg": b"no image", "txt": TEXT}])
    options = ("--model", clip_folder, "--device", "cpu", "--num_workers", 0)
    _, said = command("score", tmp_path / "0.tar", "--output", tmp_path / "out", *options)
    assert said.rstrip().endswith("none of 1 samples could be scored: 1 unreadable_image")


def test_where_no_listed_key_is_in_the_shards_the_last_line_says_so(command, clip_folder, tmp_path):
    write_shard(tmp_path / "0.tar", [*[pair(i) for i in range(3)], {"jpg": b"no image", "txt": TEXT}])
    keys = tmp_path / "keys.txt"
    for listed, fraction in [("a\nb\n", ()), ("a\n b\n", ("--keep_fraction", 1))]:
        keys.write_text(listed)
        subset = ("--subset", keys, *fraction)
        output, again = tmp_path / f"out{len(fraction)}", tmp_path / f"again{len(fraction)}"
        options = ("--model", clip_folder, "--device", "cpu", "--num_workers", 0)
        for arguments in ((output, *options), (again, "--scores", output / "_scores")):
            code, said = command("rewrite", tmp_path / "0.tar", "--output", *arguments, *subset)
            assert code == 0
            assert said.rstrip().endswith(
                f"none of 4 samples is kept: 4 not_in_subset. None of the 2 keys in '{keys}' is in these shards"
            )
    keys.write_text("000000003\nb\n")  # the one that is no image
    _, said = command("rewrite", tmp_path / "0.tar", "--output", tmp_path / "one", *options, "--subset", keys)
    assert said.rstrip().endswith("none of 4 samples is kept: 3 not_in_subset, 1 unreadable_image")


def test_a_report_is_not_told_to_make_where_one_is_made(command, clip_folder, tmp_path):
    shard, page = write_samples(tmp_path / "0.tar", {"jpg": IMAGE, "txt": TEXT}), tmp_path / "r.html"
    for number, threshold in enumerate(("0", "0.999")):
        choice = ("--threshold", threshold)
        _, said = rewrite(command, clip_folder, shard, tmp_path / f"a b{number}", *choice)
        [report] = re.findall(r"clipfilter-wds (report '.*?) --output report.html", said)
        assert command(*shlex.split(report), "--output", page)[0] == 0
        _, said = rewrite(command, clip_folder, shard, tmp_path / f"c{number}", *choice, "--report", page)
        assert "clipfilter-wds report" not in said
        assert said.rstrip().endswith(f"the report is {page}")


@pytest.mark.parametrize("members", [[], [("no_extension", b""), (".jpg", b"")]], ids=["empty", "unnamed"])
def test_shards_without_a_sample_say_what_one_is(command, clip_folder, tmp_path, members):
    write_tar(tmp_path / "0.tar", members)
    code, said = rewrite(command, clip_folder, tmp_path / "0.tar", tmp_path / "out")
    assert code == 0
    assert "the shards hold no sample: the members of one are named KEY.EXTENSION" in said
