"""Options of ``rescore`` and ``dedup`` that can't be used are refused, with what to do."""

from pathlib import Path

import pytest

from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "clip"}, "use one of neg_clip_loss"),
        ({"method": "norm_sim_2"}, "needs a target"),
        ({"method": "sum"}, "give at least two"),
        ({"method": "neg_clip_loss", "scores": "a,b"}, "takes one score folder, and 2 are given"),
        ({"method": "neg_clip_loss", "temperature": 0.0}, "must be above 0"),
        ({"method": "neg_clip_loss", "weights": "1"}, "weights is for method sum"),
        ({"method": "neg_clip_loss", "num_batches": 0}, "at least 1"),
        ({"method": "sum", "scores": "a,b", "weights": "1,2,3"}, "weights are 1, 2, 3, and there are 2 score folders"),
        ({"method": "sum", "scores": "a,b", "weights": "1,x"}, "give numbers"),
        ({"method": "sum", "scores": "a,b", "weights": "nan,1"}, "weights are nan, 1; a sum needs numbers that are"),
        ({"method": "sum", "scores": "a,b", "weights": "inf,1"}, "numbers that are finite"),
        ({"method": "sum", "scores": "a, "}, "give at least two"),
        ({"method": "then", "scores": "a,b"}, "needs fractions"),
        ({"method": "then", "scores": "a,b", "fractions": [0.2, 0.3]}, "none can be above the one before"),
        ({"method": "then", "scores": "a,b", "fractions": "30,20"}, "a fraction is 30; .* Did you mean 0.3"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        RescoreConfig(**{"scores": "a", "output": tmp_path / "out", **options})


@pytest.mark.parametrize("similarity", [0.0, 1.01, 95])
def test_a_similarity_that_is_no_cosine_is_refused(tmp_path, similarity):
    with pytest.raises(ValueError, match="similarity is"):
        DedupConfig(scores="a", output=tmp_path / "out", similarity=similarity)


@pytest.mark.parametrize("output", ["run", "run/", "run/_scores", "run/_scores/a", "up/..", "up/../run/_scores"])
@pytest.mark.parametrize("option", ["scores", "embeddings", "target"])
def test_tables_are_not_written_where_they_would_mix_with_those_that_are_read(tmp_path, output, option):
    (tmp_path / "up" / "run" / "_scores").mkdir(parents=True)
    (tmp_path / "up" / "up").mkdir()
    read = {"scores": tmp_path / "other", "target": tmp_path / "other", option: tmp_path / "up" / "run"}
    with pytest.raises(ValueError, match=r"would mix with the tables in '.*/run/_scores'; choose another folder"):
        RescoreConfig(output=f"{tmp_path}/up/{output}", method="norm_sim_2", **read)


def test_beside_the_tables_of_a_run_there_is_room(tmp_path):
    (tmp_path / "run" / "_scores").mkdir(parents=True)
    DedupConfig(scores=tmp_path / "run", output=tmp_path / "run" / "distinct")
    DedupConfig(scores=tmp_path / "run", output=tmp_path / "run2")


def test_folders_may_have_blanks_between_them(tmp_path):
    config = RescoreConfig(scores=" a, b c ,", output=tmp_path / "out", method="sum")
    assert config.folders == ["a", "b c"]


@pytest.mark.parametrize("form", [str, Path, lambda folder: [str(folder)], lambda folder: [folder]])
def test_a_folder_may_have_a_comma_in_its_name(tmp_path, form):
    (tmp_path / "x,y").mkdir()
    config = RescoreConfig(scores=form(tmp_path / "x,y"), output=tmp_path / "out", method="neg_clip_loss")
    assert config.folders == [str(tmp_path / "x,y")]


def test_folders_with_and_without_a_comma_in_their_names_go_together(tmp_path):
    for name in ("x,y", "a", "b"):
        (tmp_path / name).mkdir()
    scores = [f"{tmp_path}/a,{tmp_path}/b", f"{tmp_path}/x,y"]
    config = RescoreConfig(scores=scores, output=tmp_path / "out", method="sum")
    assert config.folders == [f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/x,y"]


def test_a_path_in_a_list_is_one_folder_also_where_it_is_not_there(tmp_path):
    config = RescoreConfig(scores=[Path("x,y"), Path("z")], output=tmp_path / "out", method="sum")
    assert config.folders == ["x,y", "z"]


def test_numbers_are_a_list_a_text_or_one_number(tmp_path):
    options = {"scores": "a,b", "output": tmp_path / "out", "method": "sum"}
    assert RescoreConfig(**options, weights="1,0.5").folder_weights == [1, 0.5]
    assert RescoreConfig(**options, weights=[1, "0.5"]).folder_weights == [1, 0.5]
    assert RescoreConfig(**options).folder_weights == [1, 1]
