"""Runs the training examples and makes a page of them: what each prints, and a picture of what came of it.

The three that take long are not run: their figures are kept in ``figures/`` from a full run, and in the
bundled tiny CLIP.
"""

import ast
import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from clipfilter_wds.demo.shards import write_demo_shards
from clipfilter_wds.models.loading import BUNDLED_MODELS
from clipfilter_wds.palette import LIGHT

ROOT = Path(__file__).parents[1]
EXAMPLES, FIGURES = ROOT / "train_examples", ROOT / "pictures" / "figures"
LIGHTNING = r"""fit --data.train 'demo_shards/*.tar' --data.scorer.model demo-tiny \
    --data.image_transform small_clip.image_view --data.text_transform small_clip.text_view \
    --data.loader.threshold 0.28 --data.loader.batch_size 32 --data.loader.num_workers 1 \
    --trainer.accelerator cpu --trainer.max_steps 100 --trainer.log_every_n_steps 5 \
    --trainer.enable_progress_bar false --trainer.logger CSVLogger --trainer.logger.save_dir ."""


@dataclass(frozen=True)
class Entry:
    """A script on the page.

    Attributes:
        script: Its name.
        options: What it is started with.
        make: Gives what it prints, run in a folder, and draws the picture.
        alt: What the picture shows, in words.
        test: Where the script is tested.
    """

    script: str
    options: str
    make: Callable[["Entry", Path, Path], str]
    alt: str
    test: str = "tests/system/test_train_examples.py"

    @property
    def about(self) -> str:
        """The first paragraph of its docstring, without commands."""
        text = ast.get_docstring(ast.parse((EXAMPLES / self.script).read_text())) or ""
        return text.partition("\n\n")[0].partition("\npython ")[0].replace("\n", " ")

    def run(self, folder: Path) -> str:
        """What it prints, started as a reader would."""
        environment = {**os.environ, "COLUMNS": "100"}
        command = f"{sys.executable} {EXAMPLES / self.script} {self.options}"
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout


def write_gallery(page: Path) -> None:
    """Write the page, and its pictures to a folder of the same name."""
    pictures = page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    sys.path.insert(0, str(EXAMPLES))  # where the examples import one another from
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo_shards(folder / "demo_shards")
        parts += [_section(entry, folder, pictures) for entry in ENTRIES]
    page.write_text("\n".join(parts))


def _section(entry: Entry, folder: Path, pictures: Path) -> str:
    picture = pictures / f"{Path(entry.script).stem}.png"
    printed = entry.make(entry, folder, picture)
    command = f"python train_examples/{entry.script} {entry.options}".rstrip()
    return (
        f"## {picture.stem}\n\n[`train_examples/{entry.script}`](../train_examples/{entry.script}): {entry.about}\n\n"
        f"<!-- run by: {entry.test} -->\n```bash\n{command}\n```\n\n```\n{printed.strip()}\n```\n\n"
        f"![{entry.alt}]({pictures.name}/{picture.name})\n"
    )


HEAD = """# Examples

Each script of `train_examples/`, with what it prints and what comes of it. They draw their own scenes and need no
download. `python -m pictures gallery` runs them and makes this page; of the last three, which take long, it shows what
a full run left, on a machine that was busy with other work.
"""


def _loop(entry: Entry, folder: Path, picture: Path) -> str:
    """A plain loop: loss and keep rate from the lines that it prints."""
    printed = entry.run(folder)
    steps = [(int(step), float(loss)) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", printed)]
    _draw_losses(picture, steps)
    return printed


def _lightning(entry: Entry, folder: Path, picture: Path) -> str:
    """Lightning: what its CSV logger wrote."""
    entry.run(folder)
    [metrics] = folder.glob("lightning_logs/version_*/metrics.csv")
    rows = [row for row in csv.DictReader(metrics.open()) if row["loss"]]
    _draw_losses(picture, [(int(row["step"]), float(row["loss"])) for row in rows])
    lines = [f"{row['step']:>4}" + "".join(f"{row[name][:6]:>24}" for name in LOGGED) for row in rows[::4]]
    heading = "step" + "".join(f"{name:>24}" for name in LOGGED)
    return "\n".join(["Of lightning_logs/version_0/metrics.csv:", heading, *lines])


def draw_filtering_pays(picture: Path, figures: Path = FIGURES / "filtering_pays.json") -> str:
    """Draw what the example found; the table that it prints.

    Args:
        picture: A PNG.
        figures: The figures.json that the example writes to its ``--output``.
    """
    sys.path.insert(0, str(EXAMPLES))
    import filtering_pays
    from retrieval import Recall

    found = json.loads(_read(figures, "filtering_pays.py"))
    outcomes = {}
    for name, run in found["runs"].items():
        recalls = [(recall.pop("step"), Recall(**recall)) for recall in run.pop("recalls")]
        outcomes[name] = filtering_pays.Outcome(**run, recalls=recalls)
    filtering_pays.plot(filtering_pays.import_pyplot(), picture, outcomes)
    plan = filtering_pays.Plan(**{name: found[name] for name in ("steps", "batch_size", "learning_rate", "seed")})
    return _printed(filtering_pays.print_table, outcomes, plan, found["galleries"] * found["gallery_size"])


def _filtering_pays(entry: Entry, folder: Path, picture: Path) -> str:
    return draw_filtering_pays(picture)


def _read(figures: Path, script: str) -> bytes:
    if not figures.is_file():
        raise SystemExit(
            f"{figures} is missing: `python train_examples/{script} --output OUT` makes OUT/figures.json; copy it there"
        )
    return figures.read_bytes()


def _compare_scores(entry: Entry, folder: Path, picture: Path) -> str:
    import compare_scores

    figures = json.loads(_read(FIGURES / "compare_scores.json", "compare_scores.py"))
    found = {name: [compare_scores.Found(**one) for one in runs] for name, runs in figures["runs"].items()}
    means = {
        name.replace("_", " "): [sum(getattr(one, of) for one in ones) / len(ones) for of in RECALLS]
        for name, ones in found.items()
    }
    figure, axes = _figure(len(means))
    for shift, (label, colour) in enumerate(zip(RECALLS, (LIGHT.kept, LIGHT.faint), strict=True)):
        places = [number + 0.36 * shift - 0.18 for number in range(len(means))]
        bars = axes.barh(places, [pair[shift] for pair in means.values()], 0.34, color=colour)
        bars.set_label(label.replace("_", " "))
        axes.bar_label(bars, fmt="{:.1%}", padding=4, color=LIGHT.ink)
    axes.set_yticks(range(len(means)), means)
    axes.legend(frameon=False, loc="lower right")
    axes.xaxis.set_major_formatter("{x:.0%}")
    _finish(figure, axes, picture, "held-out recall@1 among 100")
    plan = compare_scores.Plan(steps=figures["steps"], batch_size=figures["batch_size"], learning_rate=0.0, seed=0)
    return _printed(compare_scores.print_table, found, plan)


def _tiny_clip(entry: Entry, folder: Path, picture: Path) -> str:
    import tiny_clip_figures

    figures = json.loads((BUNDLED_MODELS["demo-tiny"] / "clipfilter.json").read_bytes())
    of_attribute = dict(sorted(figures["auc_by_changed_attribute"].items(), key=lambda item: -item[1]))
    figure, axes = _figure(len(of_attribute))
    bars = axes.barh(list(of_attribute), list(of_attribute.values()), 0.6, color=LIGHT.kept)
    axes.bar_label(bars, fmt="{:.2f}", padding=4, color=LIGHT.ink)
    axes.axvline(0.5, color=LIGHT.dropped, linestyle="--")
    _finish(figure, axes, picture, "ROC-AUC, true caption against one with this changed (0.5: chance)")
    return _printed(tiny_clip_figures.print_table, figures)


LOGGED = ("loss", "clipfilter/keep_rate", "clipfilter/score_mean", "clipfilter/wait_share")
RECALLS = ("image_to_text", "text_to_image")


def _printed(function: Callable[..., None], *arguments: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        function(*arguments)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _draw_losses(picture: Path, steps: list[tuple[int, float]]) -> None:
    figure, axes = _figure(4)
    axes.plot(*zip(*steps, strict=True), color=LIGHT.kept, linewidth=2, marker="o", markersize=4)
    axes.set(ylabel="loss", ylim=(0, 1.1 * max(loss for _, loss in steps)))
    axes.grid(axis="y", color=LIGHT.line)
    _finish(figure, axes, picture, "training steps")


def _figure(num_rows: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 0.8 + 0.45 * num_rows), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axes: Any, picture: Path, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", color=LIGHT.line)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.containers:  # bars, from the top downwards
        axes.invert_yaxis()
        axes.margins(x=0.12)
    figure.savefig(picture, dpi=200)


ENTRIES = (
    Entry("plain_loop.py", "", _loop, "The loss over 100 training steps: it begins to fall after 80"),
    Entry("fabric_loop.py", "--accelerator cpu --devices 2", _loop, "The loss of rank 0 falls over training steps"),
    Entry("train_clip.py", LIGHTNING, _lightning, "The loss that Lightning logged falls over training steps"),
    Entry(
        "filtering_pays.py",
        "",
        _filtering_pays,
        "Held-out recall over training steps: raw far below, filtered inline and rewritten ahead close together",
    ),
    Entry("compare_scores.py", "", _compare_scores, "Held-out recall of what each score chooses; chance is lowest"),
    Entry(
        "train_tiny_clip.py",
        "--output tiny_clip",
        _tiny_clip,
        "ROC-AUC by the attribute that a false caption changes",
        test="tests/demo/test_tiny_clip.py",
    ),
)
