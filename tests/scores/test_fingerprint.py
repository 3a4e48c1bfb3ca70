import json

import pytest

from clipfilter_wds.scores.fingerprint import check_fingerprint
from tests.support.score_tables import FINGERPRINT


def check(found: dict, expected: dict) -> str | None:
    """What a comparison says, None where it says nothing."""
    try:
        check_fingerprint(found, expected, "'0.parquet'")
    except ValueError as error:
        return str(error)
    return None


def test_an_equal_fingerprint_is_accepted_also_after_a_trip_through_json():
    assert check(json.loads(json.dumps(FINGERPRINT)), FINGERPRINT) is None


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("resize", 224, "resize 224 there, 32 here"),
        ("crop", [32, 31], r"crop [32, 31] there, [32, 32] here"),
        ("mean", [0.5, 0.5], "mean [0.5, 0.5] there, [0.5, 0.25] here"),
        ("nested", {"a": 2}, "nested.a 2 there, 1 here"),
        ("nested", {"a": 1, "b": ["2" * 64]}, 'nested.b ["222222222222…"] there, null here'),
        ("nested", None, 'nested null there, {"a": 1} here'),
        ("new", "x" * 1000, f"new {'x' * 100}… there, null here"),
        ("resize", None, "resize null there, 32 here"),
        ("new", "x", "new x there, null here"),
        ("weights", "1" * 64, "weights 111111111111… there, 000000000000… here"),
    ],
)
def test_a_difference_is_refused_with_both_values(name, value, shown):
    message = check({**FINGERPRINT, name: value}, FINGERPRINT)
    assert message == f"'0.parquet' was written with other settings ({shown})"


def test_all_differences_are_named():
    message = check({**FINGERPRINT, "resize": 1, "mean": 2}, FINGERPRINT)
    assert "resize 1 there, 32 here; mean 2 there" in message


@pytest.mark.parametrize("name", FINGERPRINT)
def test_a_missing_entry_is_a_difference(name):
    rest = {key: value for key, value in FINGERPRINT.items() if key != name}
    assert (check(rest, FINGERPRINT) is None) == (check(FINGERPRINT, rest) is None) == (name == "model")


def test_the_same_weights_under_another_name_are_accepted():
    assert check({**FINGERPRINT, "model": "/copied/model"}, FINGERPRINT) is None


def test_other_weights_name_both_models():
    message = check({**FINGERPRINT, "model": "other", "weights": "1" * 64}, FINGERPRINT)
    assert "model other there, m here; weights 1111" in message


def test_scores_of_another_kind_are_refused():
    message = check({**FINGERPRINT, "score": "neg_clip_loss"}, FINGERPRINT)
    assert "score neg_clip_loss there, cosine here" in message


def test_what_names_no_kind_holds_cosines():
    assert check({**FINGERPRINT, "score": "cosine"}, FINGERPRINT) is None
    assert check(FINGERPRINT, {**FINGERPRINT, "score": "cosine"}) is None
