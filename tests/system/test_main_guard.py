"""A script where processes are spawned: with a main guard it runs, and without one it ends with what to do."""

import pickle
import subprocess
import sys
import textwrap

import pytest

from clipfilter_wds.workers.crashes import SampleRef, WorkerDiedError
from tests.support.toys import pair, write_shard

GUARD = 'if __name__ == "__main__":'
HINT = (
    "its own error is above. Where processes are spawned (by default from Python 3.14), workers import the script that "
    f"starts them: put what it does under `{GUARD}`, and what a notebook defines in a module"
)

HEAD = """
import multiprocessing

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset, ScoreConfig, process_shards

multiprocessing.set_start_method({method!r}, force=True)
"""

LOADER = """
scorer = ClipScorer("demo-tiny", device="cpu")
dataset = ClipWebDataset("0.tar", scorer.preprocess)
for batch in ClipFilterLoader(dataset, scorer, threshold=None, batch_size=2, num_workers=1):
    print("batch of", len(batch["text"]))
"""

RUN = """
scorer = ClipScorer("demo-tiny", device="cpu")
print("batch of", process_shards(ScoreConfig(shards="0.tar", output="scores", num_workers=1), scorer).counts.kept)
"""


def run_script(folder, code: str) -> subprocess.CompletedProcess:
    write_shard(folder / "0.tar", [pair(0), pair(1)])
    (folder / "script.py").write_text(code)
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("code", [LOADER, RUN], ids=["loader", "run"])
def test_a_script_with_a_main_guard_runs_and_without_one_it_is_told_to_have_one(method, code, tmp_path):
    head = HEAD.format(method=method)
    done = run_script(tmp_path / "with", head + GUARD + textwrap.indent(code, "    "))
    assert (done.returncode, done.stdout) == (0, "batch of 2\n"), done.stderr
    done = run_script(tmp_path / "without", head + code)
    assert done.returncode == 1
    assert "An attempt has been made to start a new process" in done.stderr
    assert f"WorkerDiedError: a worker process died (exit code 1) at its start; {HINT}\n" in done.stderr


@pytest.mark.parametrize("exit_code", [0, 1, -11])
@pytest.mark.parametrize("sample", [None, SampleRef("a.tar", None), SampleRef("a.tar", 7)], ids=str)
def test_only_a_worker_that_ends_with_an_error_before_it_has_begun_is_taken_for_an_import(sample, exit_code):
    death = pickle.loads(pickle.dumps(WorkerDiedError(sample, exit_code)))
    assert (GUARD in str(death)) == (sample is None and exit_code == 1)
