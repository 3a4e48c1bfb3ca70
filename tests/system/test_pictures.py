"""The pictures of the documents can be made anew."""

import ast
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from pictures.chromium import CHROMEDRIVER, CHROMIUM, HOW_TO_GET_IT
from pictures.gallery import ENTRIES, draw_filtering_pays
from pictures.notebook import run_notebook
from pictures.report import HEIGHT, SCALE, WIDTH, photograph
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


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=HOW_TO_GET_IT)
def test_photograph_is_of_the_page_in_light_colours(tmp_path):
    style = "<style>:root { color-scheme: light dark } body { background: light-dark(#0f0, #f00) }</style>"
    (tmp_path / "page.html").write_text(f"<!doctype html>{style}")
    picture = photograph(tmp_path / "page.html")
    assert picture.size == (SCALE * WIDTH, SCALE * HEIGHT)
    assert picture.getcolors() == [(picture.width * picture.height, (0, 255, 0))]


def test_picture_is_drawn_from_the_figures_of_an_earlier_run(tmp_path):
    recall = {"image_to_text": 0.5, "text_to_image": 0.25}
    run = {"ahead_seconds": 1.0, "seconds": 2.0, "samples_read": 64, "true_share": 0.5}
    run["recalls"] = [{"step": step, **recall} for step in (0, 8)]
    plan = {"steps": 8, "batch_size": 8, "learning_rate": 0.001, "seed": 0, "galleries": 1, "gallery_size": 100}
    (tmp_path / "figures.json").write_text(json.dumps({**plan, "runs": {"raw": run, "inline": run, "ahead": run}}))
    assert "inline" in draw_filtering_pays(tmp_path / "picture.png", tmp_path / "figures.json")
    assert Image.open(tmp_path / "picture.png").width > 1600
    with pytest.raises(SystemExit, match=r"python train_examples/filtering_pays.py --output OUT` makes OUT/figures"):
        draw_filtering_pays(tmp_path / "picture.png", tmp_path / "none.json")


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
