import json

import numpy as np
import pytest
import torch

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.training.loader import ClipFilterLoader


@pytest.mark.parametrize("wrong", [2.5, "8", True, None])
@pytest.mark.parametrize("name", ["batch_size", "num_workers"])
def test_what_counts_is_a_whole_number(half, name, wrong):
    with pytest.raises(TypeError, match=f"{name} is {wrong!r}; it must be a whole number"):
        half.build(**{name: wrong})


@pytest.mark.parametrize("wrong", [2.5, "8", True])
@pytest.mark.parametrize("name", ["score_batch_size", "num_streams", "batches_per_epoch"])
def test_what_counts_is_a_whole_number_or_left_out(half, name, wrong):
    with pytest.raises(TypeError, match=f"{name} is {wrong!r}; it must be a whole number"):
        half.build(**{name: wrong, "end": "repeat" if name == "batches_per_epoch" else "sync"})


def test_numbers_of_numpy_and_torch_are_taken_and_saved_as_plain_ones(half, tmp_path):
    numbers = {"threshold": np.float32(0.1), "batch_size": np.int64(4), "num_streams": torch.tensor(2)}
    loader = half.but_dataset(shuffle=np.int64(3), seed=np.int32(1)).build(**numbers)
    assert {type(getattr(loader.config, name)) for name in numbers} == {float, int}
    state = json.loads(json.dumps(loader.state_dict()))
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


@pytest.mark.parametrize("shuffle", [True, 2.5, "10", None, -1])
def test_shuffle_is_a_number_of_samples(half, shuffle):
    with pytest.raises(ValueError, match=f"shuffle is {shuffle}; it is the number of samples"):
        half.but_dataset(shuffle=shuffle).build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": ""}, "record is an empty text; give the folder"),
        ({"threshold": 25}, "threshold is 25; a cosine lies in"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"score_batch_size": 0}, "score_batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"starvation_limit": 0}, "starvation_limit is 0"),
        ({"end": "stop"}, "end is 'stop'; use 'sync' or 'repeat' to train, 'each' or 'pad' to"),
        ({"end": "repeat"}, "'repeat', which never ends; batches_per_epoch says how many batches an epoch has"),
        ({"batches_per_epoch": 3}, "batches_per_epoch is for end 'repeat', and end is 'sync'"),
        ({"end": "repeat", "batches_per_epoch": 0}, "batches_per_epoch is 0"),
    ],
)
def test_unusable_options_are_refused(half, options, message):
    with pytest.raises(ValueError, match=message):
        half.build(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_last": "no"}, "drop_last is 'no'; use True or False"),
        ({"persistent_workers": 1}, "persistent_workers is 1; use True or False"),
        ({"threshold": True}, "threshold is True; it must be a number"),
        ({"worker_timeout": None}, "worker_timeout is None; it must be a number"),
        ({"starvation_limit": 1e5}, "starvation_limit is 100000.0; it must be a whole number"),
    ],
)
def test_options_of_another_type_are_refused(half, options, message):
    with pytest.raises(TypeError, match=message):
        half.build(**options)


def test_a_model_by_its_name_is_no_scorer():
    with pytest.raises(TypeError, match="scorer is 'demo-tiny'; give a ClipScorer of that model, or a ScoreFolder"):
        ClipFilterLoader([], "demo-tiny")


def test_a_misspelt_option_is_named_with_the_right_one(scorer):
    with pytest.raises(TypeError, match=r"^ClipFilterLoader has no option 'treshold'; did you mean 'threshold'"):
        ClipFilterLoader([], scorer, treshold=0.3)
    with pytest.raises(TypeError, match=r"^ClipScorer has no option 'precison'; did you mean 'precision'"):
        ClipScorer("demo-tiny", precison="fp32")


def test_loader_and_dataset_say_in_one_line_what_they_are(all_samples, scorer):
    loader = all_samples.build()
    first = loader.dataset.urls[0]
    dataset = f"ClipWebDataset({first!r} and 3 others, shuffle=0, seed=1)"
    options = "batch_size=5, threshold=None, score_batch_size=4, stats=FilterStats(seen=0, kept=0, dropped={})"
    assert repr(loader.dataset) == dataset
    assert repr(loader) == f"ClipFilterLoader({dataset}, {str(all_samples.clip)!r}, {options})"
    assert repr(ClipFilterLoader([], scorer)).startswith("ClipFilterLoader(list, ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_are_float32_whatever_the_default_dtype(half, dtype):
    expected = [batch["score"] for batch in half.build()]
    torch.set_default_dtype(dtype)
    try:
        found = [batch["score"] for batch in half.build()]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
