"""The pictures of the documents can be made anew."""

import ast
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from pictures.gallery import ENTRIES
from pictures.notebook import run_notebook
from pictures.terminal import record, write_animation

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

#: A line that is written over, and one in bold.
PROGRAM = r"print('half', end='\r', flush=True); import time; time.sleep(0.3); print('\x1b[1mwhole\x1b[0m')"


def shown(frame) -> list[str]:
    lines = ("".join(char.data for char in line).rstrip() for line in frame.lines)
    return [line for line in lines if line]


def test_recording_has_what_the_terminal_showed_from_first_to_last(tmp_path):
    frames = record([sys.executable, "-c", PROGRAM], typed="go", columns=20, rows=5, cwd=tmp_path)
    assert shown(frames[0]) == ["$"]
    assert ["$ go", "half"] in [shown(frame) for frame in frames]
    assert shown(frames[-1]) == ["$ go", "whole"]
    assert frames[-1].lines[1][0].bold

    write_animation(tmp_path / "recording.webp", frames)
    with Image.open(tmp_path / "recording.webp") as animation:
        assert animation.n_frames == len({frame.lines for frame in frames})


def test_command_that_fails_is_not_recorded(tmp_path):
    with pytest.raises(RuntimeError, match="exit code 3"):
        record([sys.executable, "-c", "raise SystemExit(3)"], typed="go", columns=20, rows=5, cwd=tmp_path)


def test_gallery_shows_every_example_that_can_be_run():
    page = (DOCS / "gallery.md").read_text()
    scripts = {path.name for path in ROOT.glob("train_examples/*.py") if "__main__" in path.read_text()}
    assert {entry.script for entry in ENTRIES} == scripts
    for script in scripts:
        assert f"python train_examples/{script}" in page
        about = ast.get_docstring(ast.parse((ROOT / "train_examples" / script).read_text()))
        assert about.split(".")[0].replace("\n", " ") in page


@pytest.mark.parametrize(
    "picture",
    sorted(path for path in DOCS.rglob("*.*") if path.suffix in (".png", ".webp")),
    ids=lambda path: path.name,
)
def test_pictures_are_sharp_and_small(picture):
    assert picture.stat().st_size < 500_000
    assert Image.open(picture).width >= 1000


@pytest.mark.slow
def test_notebook_of_the_demo_runs(tmp_path):
    cells = [cell for cell in run_notebook(tmp_path).cells if cell.cell_type == "code"]
    outputs = json.dumps([cell.outputs for cell in cells])
    assert "702 of 703 kept captions are true" in outputs
    assert outputs.count("image/png") == 2
    assert (tmp_path / "filtered" / "summary.json").exists()
