"""What the package imports is what it declares, and the other way round."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: Declared without being imported: users compose pipelines of it, as docs/training.md shows.
FOR_USERS = {"webdataset"}


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
            if module not in sys.stdlib_module_names and module != "clipfilter_wds":
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
