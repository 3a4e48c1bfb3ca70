from dataclasses import dataclass

import pytest

from clipfilter_wds.options import changed_options, check_options, did_you_mean


@dataclass
class Config:
    threshold: float = 0.25
    batch_size: int = 256
    name: str = ""


def test_a_misspelt_option_is_named_with_the_one_that_it_may_mean():
    with pytest.raises(TypeError, match=r"^Filter has no option 'treshold'; did you mean 'threshold'?"):
        check_options("Filter", ["batch_size", "treshold"], Config)


def test_an_option_like_no_other_is_named_with_all_that_there_are():
    with pytest.raises(TypeError, match=r"^Filter has no option 'xyz'; it has threshold, batch_size, name$"):
        check_options("Filter", ["xyz"], Config)


def test_options_that_there_are_pass():
    check_options("Filter", ["name", "threshold"], Config)


def test_a_hint_is_shown_as_the_reader_would_write_it():
    assert did_you_mean("treshold", ["threshold"], "--{}") == "; did you mean --threshold?"
    assert did_you_mean("xyz", ["threshold"]) == ""


def test_only_what_was_changed_or_always_counts_is_shown():
    assert changed_options(Config(name="a"), always=["threshold"]) == "threshold=0.25, name='a'"
