"""Makes pictures of the documents anew, in ``docs/``: all, or those that are named."""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

from clipfilter_wds.demo.config import DemoConfig
from clipfilter_wds.demo.run import run_demo
from pictures.gallery import draw_filtering_pays, write_gallery
from pictures.notebook import write_notebook
from pictures.report import write_report_picture
from pictures.terminal import record, write_animation

DOCS = Path(__file__).parents[1] / "docs"


def make_demo() -> None:
    """The demo's overview, a quarter as large as the PNG that the demo writes."""
    with tempfile.TemporaryDirectory() as folder:
        run_demo(DemoConfig(output=folder))
        Image.open(Path(folder) / "overview.png").save(DOCS / "demo.webp", quality=90, method=6)


def make_terminal() -> None:
    """A recording of ``clipfilter-wds demo``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "clipfilter_wds", "demo"]
        write_animation(DOCS / "terminal.webp", record(command, typed="clipfilter-wds demo", cwd=Path(folder)))


def make_report() -> None:
    """The report of the demo in a browser; takes chromium and chromedriver."""
    write_report_picture(DOCS / "report.png")


def make_filtering_pays() -> None:
    """What filtering brings, from the figures of a full run in pictures/figures/."""
    draw_filtering_pays(DOCS / "filtering_pays.png")


def make_gallery() -> None:
    """The page of the examples with its pictures; of those that take long, from the figures of a full run."""
    write_gallery(DOCS / "gallery.md")


PICTURES = {
    "demo": make_demo,
    "terminal": make_terminal,
    "report": make_report,
    "filtering_pays": make_filtering_pays,
    "gallery": make_gallery,
    "notebook": write_notebook,
}


def main() -> None:
    about = "\n".join(f"  {name:16}{make.__doc__}" for name, make in PICTURES.items())
    parser = argparse.ArgumentParser(
        prog="python -m pictures",
        description=__doc__,
        epilog=f"pictures:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"of {', '.join(PICTURES)}; by default all")
    chosen = parser.parse_args().pictures or list(PICTURES)
    if unknown := sorted(set(chosen) - set(PICTURES)):
        parser.error(f"there is no picture {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    for name in chosen:
        PICTURES[name]()


if __name__ == "__main__":
    main()
