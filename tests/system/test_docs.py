"""The code in the documents runs."""

import ast
import os
import re
from pathlib import Path

import pytest
import yaml

from clipfilter_wds.demo.shards import write_demo_shards
from tests.support.processes import in_fresh_process

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "docs" / "training.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_code_of_the_training_page_runs(tmp_path):
    write_demo_shards(tmp_path / "data")
    assert in_fresh_process(_run_blocks, TRAINING, tmp_path) >= 6


def _run_blocks(page: Path, folder: Path) -> int:
    """Run a page's blocks one after the other, as a reader would in one session; how many there were."""
    os.chdir(folder)
    session: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, python block {number}", "exec"), session)
    return number


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.stem)
def test_yaml_commands_and_links_of_a_page_are_right(page):
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)
    for script, config in re.findall(r"python (\S+\.py)|--config (\S+)", "\n".join(blocks(page, "bash"))):
        assert (ROOT / (script or config)).is_file()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists()


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.stem)
def test_code_that_starts_workers_stands_where_spawned_ones_do_not_run_it(page):
    starts_workers = re.compile(r"process_shards\(|process_table\(|\.run\(|num_workers=[1-9]")
    for code in blocks(page, "python"):
        for statement in ast.parse(code).body:
            if starts_workers.search(ast.unparse(statement)):
                assert isinstance(statement, ast.If), ast.unparse(statement)
                assert ast.unparse(statement.test) == "__name__ == '__main__'"


def test_files_that_the_architecture_page_names_as_proof_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    promises = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", page, flags=re.MULTILINE)
    assert len(promises) > 15
    for _, where, shown_by in promises:
        for path in re.findall(r"`([\w/]+\.py|[\w/]+/)`", f"{where} {shown_by}"):
            assert (ROOT / path).exists() or (ROOT / "clipfilter_wds" / path).exists(), path
