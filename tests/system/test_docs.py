"""The code in the documents runs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

import clipfilter_wds
from clipfilter_wds.demo.shards import write_demo_shards
from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.types import Sample
from tests.support.pages import PAGES, blocks_of, section_of
from tests.support.processes import in_fresh_process
from tests.support.toys import write_tar

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "docs" / "training.md"


def blocks(page: Path, language: str) -> list[str]:
    return [block.code for block in blocks_of(page.read_text()) if block.language == language]


@pytest.mark.slow
def test_code_of_the_training_page_runs(tmp_path):
    write_demo_shards(tmp_path / "data")
    assert in_fresh_process(_run_blocks, TRAINING, tmp_path) >= 6


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory) -> Path:
    """The first samples of three of the demo's shards, odd ones among them."""
    folder = tmp_path_factory.mktemp("scenes")
    for path in write_demo_shards(folder / "whole")[:3]:
        with open_shard(str(path)) as shard:
            samples = [sample for sample in read_samples(shard, SampleLayout()) if isinstance(sample, Sample)]
        members = [member for sample in samples[:48] for member in sample.members]
        write_tar(folder / "few" / path.name, [(member.name, member.data) for member in members])
    return folder / "few"


def test_training_code_of_the_readme_runs_when_it_is_pasted(few_scenes, tmp_path):
    shutil.copytree(few_scenes, tmp_path / "clipfilter_demo" / "shards")
    [code] = [code for code in blocks(ROOT / "README.md", "python") if "ClipFilterLoader(" in code]
    (tmp_path / "train.py").write_text(code)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("torch.Size([64, 3, 64, 64])")


def test_lines_that_change_in_a_pipeline_of_the_readme_run(few_scenes, tmp_path):
    shutil.copytree(few_scenes, tmp_path / "data")
    [changes] = blocks(ROOT / "README.md", "diff")
    assert in_fresh_process(_run_lines, re.findall(r"^\+(.*)$", changes, flags=re.MULTILINE), tmp_path) > 50


def _run_lines(lines: list[str], folder: Path) -> int:
    """Run lines that make a loader; how many samples it gives."""
    os.chdir(folder)
    session: dict[str, object] = {"urls": "data/{00000..00002}.tar"}
    exec(PRELUDE, session)
    exec("\n".join(lines), session)
    return sum(len(batch["image"]) for batch in session["loader"])


@pytest.mark.parametrize(
    ("section", "package"),
    [
        ("webdataset", "webdataset"),
        ("PyTorch, and any other iterable", "torch"),
        ("Hugging Face datasets", "datasets"),
        ("Hugging Face Trainer", "accelerate"),
        ("torchdata", "torchdata.nodes"),
        ("Megatron Energon", "megatron.energon"),  # not among the test's packages, since it brings a dozen others
    ],
)
def test_code_of_the_pipelines_page_runs(section, package, few_scenes, tmp_path):
    pytest.importorskip(package)
    shutil.copytree(few_scenes, tmp_path / "data")
    assert in_fresh_process(_run_section, section, tmp_path) >= 1


def _run_section(section: str, folder: Path) -> int:
    """Run a section's blocks in a session in which those of the sections that it builds on have run."""
    os.chdir(folder)
    page = ROOT / "docs" / "pipelines.md"
    session: dict[str, object] = {"__name__": "__main__"}
    exec(PRELUDE, session)
    if section == "Megatron Energon":
        (folder / "data").rename("energon")
        options = "--non-interactive --split-ratio 1,0,0 --sample-type CrudeWebdataset --no-progress"
        energon = Path(sys.executable).with_name("energon")
        subprocess.run([energon, "prepare", "energon", *options.split()], check=True, capture_output=True)
    for number, block in enumerate(blocks_of(section_of(page.read_text(), section)), start=1):
        exec(compile(block.code, f"{section}, block {number}", "exec"), session)
    return number


#: What earlier sections leave to later ones.
PRELUDE = """
import webdataset as wds
from clipfilter_wds import ClipScorer, clip_filter
from torch.utils.data import DataLoader
from torchvision.transforms import v2
scorer = ClipScorer("demo-tiny")
train_view = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(64)])
samples = wds.WebDataset("data/00002.tar", shardshuffle=False)
pairs = [(sample["jpg"], sample["txt"].decode()) for sample in samples if "jpg" in sample]
"""


def _run_blocks(page: Path, folder: Path) -> int:
    """Run a page's blocks one after the other, as a reader would in one session; how many there were."""
    os.chdir(folder)
    session: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings(record=True) as warned:
        for number, code in enumerate(blocks(page, "python"), start=1):
            exec(compile(code, f"{page.name}, python block {number}", "exec"), session)
    # Lightning's, of batches whose size it does not find and loaders that are empty.
    assert not [str(warning.message) for warning in warned if re.search("ambiguous|is zero", str(warning.message))]
    return number


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_commands_and_links_of_a_page_are_right(page):
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)
    for script, config in re.findall(r"python (\S+\.py)|--config (\S+)", "\n".join(blocks(page, "bash"))):
        assert (ROOT / (script or config)).is_file()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists()


def test_the_page_of_the_python_interface_has_every_public_name():
    named = re.findall(r"^::: clipfilter_wds\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(clipfilter_wds.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
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
