"""What the operator imports, the documentation's example, and DataFlow's own storage, registry and pipeline."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from clipfilter_wds.tables.file_storage import FileStorage
from clipfilter_wds.tables.operator import ImageClipFilter
from tests.support.pace import FOREVER
from tests.support.toys import encoded, make_clip, photo

DOCS = Path(__file__).parents[2] / "docs" / "dataflow.md"


def python(code: str, *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=FOREVER)


class TestImports:
    def test_the_operator_needs_no_pandas_and_the_package_no_torch(self, tmp_path):
        code = (
            "import sys, clipfilter_wds\nassert 'torch' not in sys.modules\n"
            "from clipfilter_wds import ImageClipFilter\nassert 'pandas' not in sys.modules\n"
            "sys.modules['pandas'] = None\n"
            "from clipfilter_wds.tables.file_storage import FileStorage\nFileStorage('a.jsonl')"
        )
        done = python(code, cwd=tmp_path)
        assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError")
        assert "pip install 'clipfilter-wds[dataflow]'" in done.stderr.splitlines()[-1]

    def test_a_dataflow_that_does_not_work_is_said_and_no_hindrance(self, tmp_path):
        (tmp_path / "dataflow" / "utils").mkdir(parents=True)
        (tmp_path / "dataflow" / "utils" / "registry.py").write_text("import a_package_that_nobody_has")
        done = python("from clipfilter_wds import ImageClipFilter", cwd=tmp_path)
        assert done.returncode == 0
        assert "can't be used, so it does not know ImageClipFilter: No module named 'a_package" in done.stderr


def doc_example() -> str:
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "filt.run" in block
    ]
    return code


@pytest.mark.slow
def test_the_documentation_example_runs_as_written(tmp_path):
    """A tiny CLIP takes the place of the hub's, and a table of two rows that of DataFlow's example."""
    make_clip(tmp_path / "openai" / "clip-vit-base-patch32")
    inputs = tmp_path / "dataflow" / "example" / "test_image_filter"
    inputs.mkdir(parents=True)
    (tmp_path / "1.png").write_bytes(encoded(photo(1), "PNG"))
    (inputs / "test_image_filter.jsonl").write_text(
        '{"image": "1.png", "caption": "A bride and groom smiling in a car."}\n'
        '{"image": "2.jpg", "caption": "A red bus driving across a snowy mountain road at night."}\n'
    )
    (tmp_path / "example.py").write_text(doc_example())
    done = subprocess.run(
        [sys.executable, "example.py"], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=FOREVER
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['image', 'caption']\n"
    assert "unreadable_image: 1" in done.stderr
    kept = (tmp_path / "cache_local" / "image_clip_filter_step1.jsonl").read_text()
    operator = ImageClipFilter(str(tmp_path / "openai" / "clip-vit-base-patch32"))
    score = operator.compute_similarity(str(tmp_path / "1.png"), "A bride and groom smiling in a car.")
    assert kept.count("\n") == (score >= 0.25)


DATAFLOW = """
import pandas as pd
from dataflow.core import OperatorABC
from dataflow.pipeline import PipelineABC
from dataflow.utils.registry import OPERATOR_REGISTRY
from dataflow.utils.storage import FileStorage
from clipfilter_wds import ImageClipFilter

assert OPERATOR_REGISTRY.get("ImageClipFilter") is ImageClipFilter
storage = FileStorage("in.jsonl", cache_path="./cache", file_name_prefix="direct", cache_type="jsonl")
operator = ImageClipFilter("clip", device="cpu")
assert isinstance(operator, OperatorABC)
assert operator.run(storage.step(), threshold=0.01) == ["image", "caption"]


class Pipeline(PipelineABC):
    def __init__(self):
        super().__init__()
        self.storage = FileStorage("in.jsonl", cache_path="./cache", file_name_prefix="pipeline", cache_type="jsonl")
        self.filter = operator

    def forward(self):
        self.filter.run(storage=self.storage.step(), input_image_key="image", threshold=0.01)


pipeline = Pipeline()
pipeline.compile()
pipeline.forward()
"""


@pytest.mark.slow
def test_it_works_with_dataflows_own_storage_registry_and_pipeline(clip_folder, table, tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    (site_packages,) = (environment / "lib").glob("python*/site-packages")
    # All that is installed here is found there too; DataFlow goes on top, without the hundred packages it names.
    (site_packages / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    root = str(Path(__file__).parents[2])
    install = [environment / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "open-dataflow", "colorlog"]
    subprocess.run(install, check=True, timeout=FOREVER)
    shutil.copytree(clip_folder, tmp_path / "clip")
    table.to_json(tmp_path / "in.jsonl", orient="records", lines=True)
    done = subprocess.run(
        [environment / "bin" / "python", "-c", DATAFLOW],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        timeout=FOREVER,
    )
    assert done.returncode == 0, done.stderr
    storage = FileStorage(str(tmp_path / "in.jsonl"), cache_path=str(tmp_path / "cache"), file_name_prefix="ours")
    ImageClipFilter(str(clip_folder), device="cpu").run(storage.step(), threshold=0.01)
    ours, direct, pipeline = (
        pd.read_json(io.StringIO((tmp_path / "cache" / f"{name}_step1.jsonl").read_text()), lines=True)
        for name in ("ours", "direct", "pipeline")
    )
    assert 0 < len(ours) < len(table)
    pd.testing.assert_frame_equal(direct, ours)
    pd.testing.assert_frame_equal(pipeline, ours)
