"""What the package imports is what it declares, and the other way round; the versions that it declares were tried."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.support.version_matrix import PAGE, RESULTS, ROWS, lower_bounds, lowest_python, page_with

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: Declared without being imported: users compose pipelines of it, as docs/training.md shows.
FOR_USERS = {"webdataset"}

#: Imported only where torch is for GPUs, and comes with it there.
OF_TORCH = {"triton"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: list[str]) -> set[str]:
    return {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def imported(*, at_once: bool) -> dict[str, str]:
    """Per distribution, a file that imports it: when the file is itself imported, or only when that is needed."""
    distributions = packages_distributions()
    found = {}
    for path in sorted((ROOT / "clipfilter_wds").rglob("*.py")):
        tree = ast.parse(path.read_text())
        top_level = {module for node in tree.body for module in modules_of(node)}
        everywhere = {module for node in ast.walk(tree) for module in modules_of(node)}
        for module in top_level if at_once else everywhere - top_level:
            if module not in {*sys.stdlib_module_names, "clipfilter_wds", *OF_TORCH}:
                [distribution] = set(distributions.get(module, [module]))
                found[normalised(distribution)] = str(path.relative_to(ROOT))
    return found


def modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [node.module.partition(".")[0]] if isinstance(node, ast.ImportFrom) else []


DECLARED = names_of(PROJECT["dependencies"])
EXTRAS = {
    name
    for extra, requirements in PROJECT["optional-dependencies"].items()
    if extra not in ("benchmarks", "docs", "pictures", "test", "dev")  # which users of the package don't install
    for name in names_of(requirements)
}


def test_what_is_imported_with_the_package_is_a_dependency():
    undeclared = {name: where for name, where in imported(at_once=True).items() if name not in DECLARED}
    assert undeclared == {}


def test_what_is_imported_when_it_is_needed_is_a_dependency_or_an_extra():
    undeclared = {name: where for name, where in imported(at_once=False).items() if name not in DECLARED | EXTRAS}
    assert undeclared == {}


def test_every_dependency_is_imported():
    assert DECLARED - imported(at_once=True).keys() - imported(at_once=False).keys() == FOR_USERS


def test_reading_shards_imports_neither_torch_nor_webdataset():
    code = "import sys, clipfilter_wds.shards.samples; print({'torch', 'webdataset', 'aiohttp'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# --- versions ---

TRIED = json.loads(RESULTS.read_text())


def release(version: str) -> list[str]:
    """2.4.0+cpu -> 2, 4: without zeros behind, which make no difference."""
    return re.sub(r"(\.0)*(\+.*)?$", "", version).split(".")


def test_the_lowest_versions_that_are_declared_are_those_that_were_tried_together():
    floors = TRIED["floors"]["versions"]
    assert {name: release(floors[name]) for name in lower_bounds()} == {
        name: release(version) for name, version in lower_bounds().items()
    }
    assert floors["python"].rpartition(".")[0] == lowest_python()


def test_every_python_that_is_declared_was_tried():
    pythons = [classifier for classifier in PROJECT["classifiers"] if ":: Python :: 3." in classifier]
    declared = {classifier.rpartition(" ")[2] for classifier in pythons}
    assert declared == {result["versions"]["python"].rpartition(".")[0] for result in TRIED.values()}


def test_rows_that_were_tried_passed():
    assert TRIED.keys() <= ROWS.keys()
    assert {name: (row["failed"], row["error"]) for name, row in TRIED.items()} == dict.fromkeys(TRIED, (0, 0))
    assert min(row["passed"] for row in TRIED.values()) > 100


def test_the_page_shows_what_was_tried():
    assert page_with(TRIED, PAGE.read_text()) == PAGE.read_text()
