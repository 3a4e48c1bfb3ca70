import json

import pytest

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
from clipfilter_wds.console import plain, printable
from tests.support.outputs import rewrite
from tests.support.toys import pair, write_shard, write_tar

ESCAPES = "\x1b[31m\x1b]0;title\x07\x1bc\x9b2J\u202e\r"


def test_a_terminal_is_sent_no_control_character_of_anybodys_data(command, clip_folder, tmp_path):
    folder = tmp_path / "in"
    write_shard(folder / f"good{ESCAPES}.tar", [{"jpg": pair(1)["jpg"], "txt": ESCAPES.encode() * 9}])
    members = [(f"{ESCAPES}.jpg", b""), ("b.txt", b""), (f"{ESCAPES}.txt", b""), ("c.jpg", b"")]
    write_tar(folder / f"unsorted{ESCAPES}.tar", members, format=1)
    (folder / f"garbage{ESCAPES}.tar").write_bytes(b"\x1b[31m" * 1000)
    code, said = rewrite(command, clip_folder, f"{folder}/*.tar", tmp_path / "out")
    assert code == 1
    assert "not sorted" in said
    assert "not a tar archive" in said
    check_harmless(said)
    for arguments in (
        ("rewrite", f"{ESCAPES}.tar", "--output", tmp_path / "out2"),
        ("rewrite", f"{folder}/*.tar", "--output", tmp_path / "out2", "--model", f"./{ESCAPES}"),
    ):
        code, said = command(*arguments)
        assert code == 2
        check_harmless(said)


def test_what_is_said_of_a_tables_rows_is_harmless(command, clip_folder, tmp_path):
    rows = [{"image": f"{ESCAPES}.jpg", "caption": ESCAPES + "x"}, {"image": "x", "caption": "y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + ESCAPES + "\n")
    arguments = ("--output", tmp_path / "kept.jsonl", "--model", clip_folder, "--num_workers", "0")
    _, said = command("table", tmp_path / "rows.jsonl", *arguments)
    assert "unreadable_image" in said
    check_harmless(said)


def test_what_a_loader_logs_is_harmless(clip_folder, tmp_path, caplog):
    scorer = ClipScorer(clip_folder, device="cpu")
    (tmp_path / f"garbage{ESCAPES}.tar").write_bytes(b"\x1b[31m" * 1000)
    write_shard(tmp_path / "good.tar", [pair(1)])
    dataset = ClipWebDataset(f"{tmp_path}/*.tar", scorer.preprocess)
    list(ClipFilterLoader(dataset, scorer, threshold=None))
    assert "a shard is left out" in caplog.text
    check_harmless(caplog.text)


def check_harmless(text: str) -> None:
    """No character that a terminal obeys, but for line ends."""
    assert {char for char in text if not char.isprintable()} <= {"\n"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain 画像 🐈", "plain 画像 🐈"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\u202e\u2066\x9b", "\\u202e\\u2066\\x9b"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_is_not_printable_is_written_out(text, shown):
    assert printable(text) == shown


def test_rich_markup_is_shown_and_not_obeyed():
    assert plain("[red]x[/]") == "\\[red]x\\[/]"
