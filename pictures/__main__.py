"""Makes pictures of the documents anew, in ``docs/``: all, or those that are named."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from clipfilter_wds.demo.config import DemoConfig
from clipfilter_wds.demo.run import run_demo
from pictures.gallery import write_gallery
from pictures.notebook import write_notebook
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


def make_gallery() -> None:
    """The page of the examples with its pictures; the README shows one of them, too."""
    write_gallery(DOCS / "gallery.md")
    shutil.copyfile(DOCS / "gallery" / "filtering_pays.png", DOCS / "filtering_pays.png")


PICTURES = {"demo": make_demo, "terminal": make_terminal, "gallery": make_gallery, "notebook": write_notebook}


def main() -> None:
    about = "\n".join(f"  {name:10}{make.__doc__}" for name, make in PICTURES.items())
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
