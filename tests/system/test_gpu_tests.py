"""The tests for a GPU are found on a machine that has what the package needs, a checkout, and little else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Of the extra ``test``, what a machine with PyTorch, transformers and Lightning hardly has.
ABSENT = (
    "ray", "moto", "s3fs", "faiss", "open_clip", "pyte", "selenium", "nbclient", "ipykernel", "datasets", "torchdata",
    "tensorboardX", "axe_playwright_python",
)  # fmt: skip


@pytest.mark.slow
def test_they_are_found_without_the_packages_that_only_other_tests_take(tmp_path):
    hide = "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split())); import pytest; "
    run = "sys.exit(pytest.main(['-n0', '-m', 'gpu', '--collect-only', '-q', '-p', 'no:cacheprovider']))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", hide + run, " ".join(ABSENT)]  # -P: as the command pytest, without "."
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = set(re.findall(r"^tests/(\S+?)/\S+\.py::", done.stdout, re.MULTILINE))
    assert {"models", "offline", "training", "workers"} <= found
