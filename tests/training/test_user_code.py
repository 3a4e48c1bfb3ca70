import pytest
import torch

from tests.support.restore import NUMBERS, Recipe, image_number, keys, write_numbered


def fails(value):
    raise KeyError("no such thing")


def fails_at_one(image):
    if image_number(image) == 1003:
        raise ValueError("odd")
    return torch.zeros(2)


def has_no_next(value):
    return next(iter(()))


def gives_none(value):
    return None


def gives_a_number(value):
    return 3


def grows(caption):
    return torch.zeros(int(caption.split()[-1]) % 7)


@pytest.fixture(scope="module")
def recipe(clip_folder, tmp_path_factory):
    shards = write_numbered(tmp_path_factory.mktemp("user"), NUMBERS[:2])
    return Recipe(clip=clip_folder, shards=shards, loader={"threshold": None, "batch_size": 5})


def message(recipe, num_workers=0, **transforms):
    """What an error says, with its notes."""
    with pytest.raises(Exception) as raised:  # noqa: PT011  # whatever the transform raises
        keys(recipe.but_dataset(**transforms).build(num_workers=num_workers))
    return "\n".join([str(raised.value), *getattr(raised.value, "__notes__", ())])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("option", ["image_transform", "text_transform", "sample_transform"])
def test_an_error_names_the_option_and_the_sample(recipe, option, num_workers):
    said = message(recipe, num_workers, **{option: fails})
    assert "no such thing" in said
    assert f"in {option}, of sample '000000000' of " in said
    assert "00000.tar" in said


def test_it_is_the_sample_at_which_it_was_raised(recipe):
    said = message(recipe, image_transform=fails_at_one)
    assert said.startswith("odd")
    assert "in image_transform, of sample '000001003' of" in said
    assert "00001.tar" in said


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("option", ["image_transform", "text_transform", "sample_transform"])
def test_a_stop_of_iteration_ends_no_stream(recipe, option, num_workers):
    said = message(recipe, num_workers, **{option: has_no_next})
    assert f"StopIteration was raised in {option}, of sample '000000000'" in said


@pytest.mark.parametrize(("option", "transform"), [("image_transform", gives_none), ("text_transform", grows)])
def test_what_can_not_be_collated_names_the_option_and_what_can(recipe, option, transform):
    said = message(recipe, **{option: transform})
    assert f"where what {option} gave of several samples is made a batch: it needs tensors or arrays" in said


def some_columns(members):
    return {} if members["__key__"].endswith("1") else {"number": 1}


def test_samples_of_different_columns_are_refused_with_all_names(recipe):
    said = message(recipe, sample_transform=some_columns)
    assert "gave one sample the columns ['number'] and another []; it has to give all samples the same" in said


def test_a_sample_transform_that_gives_no_columns_says_so(recipe):
    assert "sample_transform gave a int; it has to give a dict" in message(recipe, sample_transform=gives_a_number)
