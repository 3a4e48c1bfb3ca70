"""Runs a part of the tests with several sets of versions, and writes down what was installed and what passed.

``python -m tests.support.version_matrix`` runs all rows, with names behind it these. It is run by hand, since a row has
an environment of its own, of some gigabytes, in ``build/versions``. It takes ``uv``, and the interpreters on the PATH.
"""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE, RESULTS = ROOT / "docs" / "versions.md", ROOT / "docs" / "versions.json"

#: The extras that the tests below use.
EXTRAS = ("dataflow", "dedup", "open-clip", "siglip")
_TOOLS = ("pytest>=8.0", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "psutil>=6.0")

#: Models, preprocessing, offline runs, training with Lightning, tables and commands.
TESTS = (
    "tests/models/fast/test_optimize.py",
    "tests/models/fast/test_text_tower.py",
    "tests/models/test_dual_encoders.py",
    "tests/models/test_releases.py",
    "tests/models/test_scorer.py",
    "tests/preprocess/test_image.py::test_pixels_equal_those_of_the_image_processor",
    "tests/preprocess/test_image.py::test_pixels_equal_those_of_the_image_processor_at_any_size",
    "tests/preprocess/test_image.py::test_every_mode_becomes_the_rgb_that_the_reference_makes_of_it",
    "tests/preprocess/test_image.py::test_every_allowed_format_is_decoded",
    "tests/cli/test_parser.py",
    "tests/tables/test_run.py",
    "tests/offline/test_run.py",
    "tests/training/test_datamodule.py::test_a_run_that_max_steps_cut_off_resumes_where_it_was",
    "tests/training/test_datamodule.py::test_evaluation_is_scored_and_unfiltered_unless_told",
    "tests/training/test_datamodule.py::test_load_from_checkpoint_makes_a_data_module_that_begins_at_the_beginning",
    "tests/training/test_datamodule.py::test_every_option_of_scorer_and_loader_reaches_them",
)


@dataclass(frozen=True)
class Row:
    """A set of versions: the newest of everything that is not pinned.

    Attributes:
        python: Major and minor version.
        pins: Requirements.
    """

    python: str
    pins: tuple[str, ...] = ()


def lower_bounds() -> dict[str, str]:
    """The lowest version that pyproject.toml allows of each distribution that the tests here use."""
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(requirement for extra in EXTRAS for requirement in extras[extra])]
    return dict(re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", requirement).groups() for requirement in requirements)


def lowest_python() -> str:
    """The lowest Python that pyproject.toml allows."""
    return PROJECT["requires-python"].removeprefix(">=")


ROWS = {
    "floors": Row(lowest_python(), tuple(f"{name}=={version}" for name, version in lower_bounds().items())),
    "transformers 4": Row("3.11", ("transformers<5",)),
    "torch 2.11": Row("3.12", ("torch==2.11.*",)),
    "newest": Row("3.13"),
}


def run(row: Row, environment: Path) -> dict[str, Any]:
    """Make the environment, and run the tests in it."""
    python = environment / "bin" / "python"
    subprocess.run(["uv", "venv", "--quiet", "--allow-existing", "--python", row.python, environment], check=True)
    package = ["--editable", f"{ROOT}[{','.join(EXTRAS)}]"]
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, *package, *_TOOLS, *row.pins], check=True)
    pytest = [python, "-m", "pytest", "-v", "-n", "0", "-o", "addopts=", "-m", "not slow"]
    pytest += ["--import-mode=importlib", "-p", "no:cacheprovider", "--tb=short", *TESTS]
    last_line = ""
    with subprocess.Popen(pytest, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        for last_line in tests.stdout:
            print(last_line, end="", flush=True)
    counts = {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|failed|error)", last_line)}
    return {"versions": _installed(python), "passed": 0, "failed": 0, "error": 0, **counts}


def _installed(python: Path) -> dict[str, str]:
    code = "import json, platform, sys; from importlib.metadata import version; "
    code += "print(json.dumps({'python': platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))"
    return json.loads(subprocess.check_output([python, "-c", code, *lower_bounds()]))


def page_with(results: dict[str, Any], page: str) -> str:
    """The page with a table of these results."""
    shown = ("python", "torch", "transformers", "lightning", "numpy", "pillow", "pyarrow")
    lines = [f"| | {' | '.join(shown)} | tests passed |", f"|{'---|' * (len(shown) + 2)}"]
    for name, result in results.items():
        versions = " | ".join(result["versions"][distribution].partition("+")[0] for distribution in shown)
        total = result["passed"] + result["failed"] + result["error"]
        lines.append(f"| {name} | {versions} | {result['passed']:,} of {total:,} |")
    before, _, rest = page.partition("<!-- rows -->\n")
    return "\n".join([f"{before}<!-- rows -->", *lines, f"<!-- end -->{rest.partition('<!-- end -->')[2]}"])


def main(names: list[str]) -> None:
    """Run rows, and put their results into the page and the file beside it."""
    for name in names or ROWS:
        result = run(ROWS[name], ROOT / "build" / "versions" / name.replace(" ", "-"))
        known = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), name: result}
        results = {row: known[row] for row in ROWS if row in known}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page_with(results, PAGE.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
