"""What becomes of an iteration that is not over when something else begins."""

import copy
import pickle
import subprocess
import sys

import pytest

from tests.support.restore import keys


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_an_iteration_that_is_not_over_takes_nothing_from_the_next_ones(half, persistent_workers):
    epochs = keys(half.build(), 3)
    loader = half.build(num_workers=1, persistent_workers=persistent_workers)
    kept_open = iter(loader)  # as in a notebook
    first = [next(kept_open)["__key__"]]
    assert keys(loader, 2) == epochs[1:]
    state = loader.state_dict()
    assert [*first, *(batch["__key__"] for batch in kept_open)] == epochs[0]
    assert loader.state_dict() == state
    assert keys(loader) == keys(half.build(), 4)[3:]
    loader.close()


@pytest.mark.parametrize(
    "begin", [lambda loader, state: loader.load_state_dict(state), lambda loader, _: loader.set_epoch(0)]
)
def test_a_beginning_that_is_set_in_an_iteration_holds_when_that_continues(half, begin):
    first = keys(half.build())[0]
    loader = half.build()
    state = loader.state_dict()
    batches = iter(loader)
    next(batches)
    begin(loader, state)
    assert [batch["__key__"] for batch in batches] == first[1:]
    assert loader.state_dict()["streams"] == state["streams"]
    assert keys(loader) == [first]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}, {"record": "record"}], ids=str)
def test_a_copy_of_a_loader_in_use_begins_where_that_would(half, tmp_path, monkeypatch, options, copied):
    monkeypatch.chdir(tmp_path)
    epochs = keys(half.build(), 3)
    loader = half.build(**options)
    assert keys(loader) == epochs[:1]
    batches = iter(loader)
    assert next(batches)["__key__"] == epochs[1][0]
    copy_ = copied(loader)
    assert copy_.stats.seen > 48
    assert copy_.state_dict() == loader.state_dict()
    assert keys(copy_) == epochs[2:]
    assert [batch["__key__"] for batch in batches] == epochs[1][1:]
    loader.close()
    copy_.close()


def test_a_program_that_ends_with_an_open_iteration_says_nothing(half):
    script = f"""
from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset
scorer = ClipScorer({str(half.clip)!r}, device="cpu")
loader = ClipFilterLoader(ClipWebDataset({half.shards!r}, scorer.preprocess), scorer, threshold=None, batch_size=5)
batches = iter(loader)
next(batches)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr == ""
