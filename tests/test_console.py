import io
import json
import re
import time

import pytest
from rich.console import Console

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
from clipfilter_wds import console as module
from clipfilter_wds.console import (
    Shown,
    count_rows,
    pace,
    plain,
    print_summary,
    printable,
    show_progress,
)
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


# --- the bar and the closing table ---

SHOWN = [
    Shown("scoring", 0.25, "[bold]1/4[/] shards", "50 samples/s", "1/4 shards, 50 samples/s"),
    Shown("copying", 1.0, "[bold]4/4[/] shards", "60 samples/s", "4/4 shards, 60 samples/s"),
]


def show(console: Console) -> str:
    with show_progress(console) as update:
        for shown in SHOWN:
            update(shown)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert re.search(r"copying ━{25} 4/4 shards  60 samples/s", show(console))
    assert console.file.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize("width", [30, 40, 50, 120, 200])
def test_a_narrow_terminal_drops_the_pace_first_and_never_the_count(width):
    shown = show(Console(file=io.StringIO(), force_terminal=True, width=width))
    assert ("60 samples/s" in shown) == (width >= 50)
    last = next(line for line in re.split(r"[\r\n]", shown) if "copying" in line)
    assert re.match(r"copying ━+ 4/4 shards", last)
    assert len(last.rstrip()) <= width


def test_what_is_no_terminal_gets_a_line_now_and_then(monkeypatch):
    assert show(Console(file=io.StringIO(), width=100)) == ""  # the ten seconds are not over
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    assert show(Console(file=io.StringIO(), width=100)).splitlines() == [shown.line for shown in SHOWN]


def test_lines_come_no_more_often_than_they_may(monkeypatch):
    monkeypatch.setattr(module, "_LINE_SECONDS", 10.0)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=100)
    with show_progress(console) as update:
        for second in range(35):
            now = float(second)
            update(SHOWN[0])
    assert console.file.getvalue().count("\n") == 3


@pytest.mark.parametrize(
    ("keep_rate", "seconds_left", "text"),
    [(None, None, "1,235 samples/s"), (0.5, 61.0, "1,235 samples/s, 50.0% kept, 0:01:01 left")],
)
def test_a_pace_has_what_is_known(keep_rate, seconds_left, text):
    assert pace(1234.5678, keep_rate, seconds_left) == text


def test_a_pace_says_that_samples_are_scored_where_none_is_kept_or_dropped():
    assert pace(10, 0.972, None, kept_as="scored") == "10 samples/s, 97.2% scored"


def test_the_closing_table_has_counts_shares_and_notes():
    console = Console(file=io.StringIO(), width=40)
    rows = [*count_rows(4000, 1000, [("torn", 3000)], kept_as="scored"), ("shards", 1, "of 2")]
    print_summary(console, rows, seconds=3600, samples_per_second=1.1, notes=["[red]failed[/] " + "x" * 60])
    assert [line.split() for line in console.file.getvalue().splitlines()] == [
        ["seen", "4,000"],
        ["scored", "1,000", "25.0%"],
        ["dropped:", "torn", "3,000", "75.0%"],
        ["shards", "1", "of", "2"],
        ["time", "1:00:00", "1", "samples/s"],
        ["failed", "x" * 60],
    ]


def test_of_nothing_there_are_no_shares():
    console = Console(file=io.StringIO(), width=40)
    print_summary(console, count_rows(0, 0, []), seconds=0, samples_per_second=0, notes=[])
    assert [line.split() for line in console.file.getvalue().splitlines()][:2] == [["seen", "0"], ["kept", "0"]]
