import shutil
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from clipfilter_wds.models.forward_pool import ForwardCancelledError, forward_pool
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.scores.kind import COSINES
from tests.support.pace import FOREVER
from tests.support.toys import encoded, make_clip, photo


@pytest.fixture(autouse=True, params=[4])
def num_threads(request):
    """Of torch, whatever the machine has and whatever else it runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)
    return ClipScorer(folder, device="cpu", precision="bf16")


@pytest.fixture(scope="module")
def batches(scorer):
    """Fifteen batches of different sizes."""
    pairs = [scorer.preprocess.open_pair(encoded(photo(seed)), f"{'word ' * (seed % 9)}{seed}") for seed in range(120)]
    pixel_values, tokens = scorer.preprocess.collate(pairs)
    sizes = list(range(1, 16))
    return list(zip(pixel_values.split(sizes), tokens.input_ids.split(sizes), strict=True))


def itself(batch, may_be_kept):
    return batch


def forward_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("clipfilter-forward")]


def scored(scorer, batches, threshold, *, largest_error=0.0):
    recheck = Recheck(scorer, threshold)
    recheck._learn(np.array([largest_error]))
    return [
        (number, scores) for number, scores in recheck.map(range(len(batches)), lambda number: batches[number], itself)
    ]


def test_side_by_side_is_what_one_after_another_is(scorer, batches):
    # A band that nothing widens: when one widens, and so what is computed again, depends on how much is in flight.
    torch.set_num_threads(1)
    one_by_one = scored(scorer, batches, 0.03, largest_error=0.005)
    torch.set_num_threads(4)
    side_by_side = scored(scorer, batches, 0.03, largest_error=0.005)
    assert [number for number, _ in side_by_side] == list(range(len(batches)))
    assert sum(scores.num_rechecked for _, scores in one_by_one) > 8
    for (_, expected), (_, found) in zip(one_by_one, side_by_side, strict=True):
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert found.num_rechecked == expected.num_rechecked


@pytest.mark.parametrize(
    ("num_threads", "share", "num_streams"), [(2, 1, 2), (4, 1, 4), (11, 2, 4)], indirect=["num_threads"]
)
def test_forward_threads_share_out_torchs_threads_and_leave_all_others_alone(scorer, num_threads, share, num_streams):
    def threads_used():
        torch.ones(100_000).add_(1)  # the first operation that may use several
        return torch.get_num_threads()

    with forward_pool(scorer.device, scorer.fast.width) as pool:
        assert pool.num_ahead >= num_streams
        barrier = threading.Barrier(num_streams, timeout=FOREVER)
        waits = [pool.run(lambda: (barrier.wait(), threads_used())[1]) for _ in range(num_streams)]
        assert [wait() for wait in waits] == [share] * num_streams
        others = []
        other = threading.Thread(target=lambda: others.append(threads_used()))
        other.start()
        other.join()
        assert [threads_used(), *others] == [num_threads] * 2
    assert forward_threads() == []


def test_small_models_and_single_threads_are_scored_where_they_are(scorer, tmp_path):
    small = ClipScorer(make_clip(tmp_path), device="cpu")
    with forward_pool(small.device, small.fast.width) as pool:
        assert pool.run(threading.current_thread)() is threading.current_thread()
    torch.set_num_threads(1)
    with forward_pool(scorer.device, scorer.fast.width) as pool:
        assert pool.run(threading.current_thread)() is threading.current_thread()


def test_an_error_reaches_the_caller_and_no_thread_is_left(scorer, batches):
    broken = [*batches[:6], (batches[6][0][:, :, :32], batches[6][1]), *batches[7:]]
    decided = []
    recheck = Recheck(scorer, 0.9)  # far from all scores, so that none waits
    with pytest.raises(ValueError, match="size"):  # noqa: PT012  # the loop is what is left by it
        for number, _ in recheck.map(range(len(broken)), lambda number: broken[number], itself):
            decided.append(number)
    assert decided == list(range(len(decided)))
    assert forward_threads() == []


def test_a_batch_that_nobody_waits_for_ends_between_two_of_its_groups(scorer, batches):
    pixel_values = batches[14][0].repeat(20, 1, 1, 1)  # ten groups
    begun, all_begun = Counter(), threading.Barrier(5, timeout=FOREVER)

    def check():
        begun[threading.current_thread()] += 1
        if begun[threading.current_thread()] == 2:
            all_begun.wait()
            pool._closed.wait(FOREVER)
        pool.raise_if_cancelled()

    with forward_pool(scorer.device, scorer.fast.width) as pool:
        waits = [pool.run(scorer.fast.encode_image, pixel_values, check=check) for _ in range(4)]
        all_begun.wait()
    for wait in waits:
        with pytest.raises(ForwardCancelledError):
            wait()
    assert list(begun.values()) == [2] * 4


def test_batches_that_nobody_takes_are_not_worked_on(scorer, batches):
    begun, many = [], 10 * batches
    mapped = Recheck(scorer, 0.9).map(range(len(many)), lambda number: begun.append(number) or many[number], itself)
    next(mapped)
    mapped.close()
    assert len(begun) < len(many)
    assert forward_threads() == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_decides_as_float32_does(scorer, batches):
    compiled = ClipScorer(scorer.model_name, device="cpu", precision="bf16", compile=True)
    exact = np.concatenate([scorer(*batch, exact=True).numpy() for batch in batches])
    threshold = float(np.sort(exact)[60])
    found = np.concatenate([scores.scores for _, scores in scored(compiled, batches, threshold)])
    np.testing.assert_array_equal(COSINES.passes(found, threshold), COSINES.passes(exact, threshold))
    assert not np.array_equal(found, exact)
    np.testing.assert_allclose(found, exact, atol=5e-3)
