"""What a checkpoint lacks is never made up: without a file, it scores the same bits or is refused, naming the file."""

import itertools
import json
import math
import shutil

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from clipfilter_wds import ClipScorer
from clipfilter_wds.models.dual_encoder import ModelError
from tests.support.model_folders import FOLDERS
from tests.support.toys import encoded, photo

CAPTIONS = [
    "a red circle",
    "three blue squares",
    "xyz",
    "A Photo  OF\tsomething?",
    "中文图片 a 红色的狗",
    "<|endoftext|> </s> [PAD] <pad> in the caption",
    "a caption that is far longer than any of these small text towers takes, " * 3,
]
#: Files of tokenizers in all kinds of folders.
TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model",
}  # fmt: skip


def scores(model: str) -> torch.Tensor:
    scorer = ClipScorer(model, device="cpu", precision="fp32")
    pairs = [scorer.preprocess.open_pair(encoded(photo(1)), caption) for caption in CAPTIONS]
    pixel_values, tokens = scorer.preprocess.collate(pairs)
    return scorer(pixel_values, tokens.input_ids)


@pytest.mark.parametrize("kind", FOLDERS)
def test_without_any_files_a_folder_scores_the_same_or_is_refused_with_a_name(kind, tmp_path):
    make, prefix = FOLDERS[kind]
    whole = make(tmp_path / "whole")
    expected = scores(f"{prefix}{whole}")
    assert len(set(expected.tolist())) == len(CAPTIONS)

    files = {path.name for path in whole.iterdir()}
    removals = {frozenset([file]) for file in files}
    for number in range(1, len(files & TOKENIZER) + 1):
        removals |= set(map(frozenset, itertools.combinations(files & TOKENIZER, number)))
    outcomes = set()
    for removed in sorted(removals, key=sorted):
        folder = tmp_path / "part"
        shutil.copytree(whole, folder, ignore=lambda _, names, removed=removed: removed & set(names))
        try:
            assert torch.equal(scores(f"{prefix}{folder}"), expected), removed
            outcomes.add("same")
        except ModelError as error:
            message = str(error)
            outcomes.add("refused" if any(file in message for file in removed) else message)
        shutil.rmtree(folder)
    assert outcomes <= {"same", "refused"}
    assert "refused" in outcomes


def refusal(model: str) -> str:
    with pytest.raises(ModelError) as raised:
        ClipScorer(model, device="cpu")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def clip(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "clip")


def change_json(path, change) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def change_weights(path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


class TestWeights:
    @pytest.mark.parametrize("kind", [kind for kind in FOLDERS if kind != "sharded clip"])
    def test_without_the_scale_of_cosines_scores_are_the_same(self, kind, tmp_path):
        make, prefix = FOLDERS[kind]
        whole = make(tmp_path / "whole")
        expected = scores(f"{prefix}{whole}")
        file = next(whole.glob("*model.safetensors"))
        change_weights(file, lambda weights: [weights.pop(f"logit_{name}", None) for name in ("scale", "bias")])
        assert torch.equal(scores(f"{prefix}{whole}"), expected)

    @pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
    def test_the_temperature_is_that_of_the_checkpoint_and_never_made_up(self, kind, tmp_path):
        make, prefix = FOLDERS[kind]
        whole = make(tmp_path / "whole")
        file = next(whole.glob("*model.safetensors"))
        scale = load_file(file)["logit_scale"].double().item()
        assert ClipScorer(f"{prefix}{whole}", device="cpu").temperature == pytest.approx(math.exp(-scale), rel=1e-6)
        change_weights(file, lambda weights: weights.pop("logit_scale"))
        assert ClipScorer(f"{prefix}{whole}", device="cpu").temperature is None

    @pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
    def test_any_other_that_is_missing_is_named(self, kind, tmp_path):
        make, prefix = FOLDERS[kind]
        folder = make(tmp_path / "model")
        file = next(folder.glob("*model.safetensors"))
        weights = load_file(file)
        for name in sorted(weights)[:: max(1, len(weights) // 8)]:
            if not name.startswith("logit_"):
                save_file(
                    {key: value for key, value in weights.items() if key != name}, file, metadata={"format": "pt"}
                )
                assert name in refusal(f"{prefix}{folder}")

    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            ("clip", "vision_model.embeddings.position_embedding.weight"),
            ("clip", "text_model.embeddings.token_embedding.weight"),
            ("open_clip", "visual.positional_embedding"),
            ("open_clip", "positional_embedding"),
            ("open_clip", "visual.proj"),
        ],
    )
    def test_another_shape_is_no_match_and_never_resized(self, kind, name, tmp_path):
        make, prefix = FOLDERS[kind]
        folder = make(tmp_path / "model")
        file = next(folder.glob("*model.safetensors"))
        change_weights(file, lambda weights: weights.update({name: weights[name].repeat(2, 1)[:-1].clone()}))
        message = refusal(f"{prefix}{folder}")
        assert name in message
        assert file.name in message or "size mismatch" in message

    def test_weights_of_an_open_clip_that_its_config_does_not_know(self, tmp_path):
        make, prefix = FOLDERS["open_clip"]
        folder = make(tmp_path / "model")
        change_weights(folder / "open_clip_model.safetensors", lambda weights: weights.update(extra=torch.ones(1)))
        message = refusal(f"{prefix}{folder}")
        assert "'extra'" in message
        assert "open_clip_config.json" in message


@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_a_config_that_leaves_out_a_tower(clip, tower):
    change_json(clip / "config.json", lambda config: config.pop(tower))
    message = refusal(clip)
    assert "config.json" in message
    assert tower in message


class TestImages:
    @pytest.mark.parametrize("setting", ["size", "resample", "image_mean", "image_std"])
    @pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
    def test_a_setting_without_which_a_default_would_be_taken(self, clip, file, setting):
        settings = json.loads((clip / "processor_config.json").read_bytes())["image_processor"]
        del settings[setting]
        (clip / "processor_config.json").unlink()
        (clip / file).write_text(json.dumps({"image_processor": settings} if file[:3] == "pro" else settings))
        message = refusal(clip)
        assert file in message
        assert setting in message

    @pytest.mark.parametrize("setting", ["mean", "std"])
    def test_of_open_clip(self, tmp_path, setting):
        make, prefix = FOLDERS["open_clip"]
        folder = make(tmp_path / "model")
        change_json(folder / "open_clip_config.json", lambda config: config["preprocess_cfg"].pop(setting))
        message = refusal(f"{prefix}{folder}")
        assert setting in message
        assert "open_clip_config.json" in message

    def test_images_of_another_size_than_the_tower_takes(self, clip):
        def enlarge(config: dict) -> None:
            config["image_processor"].update(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})

        change_json(clip / "processor_config.json", enlarge)
        message = refusal(clip)
        assert "64 x 64" in message
        assert "asks for 32" in message


class TestTokenizers:
    def test_one_that_is_almost_empty(self, clip):
        def empty(tokenizer: dict) -> None:
            special = {"<|startoftext|>": 512, "<|endoftext|>": 513}
            tokenizer["model"].update(vocab=special, merges=[])

        change_json(clip / "tokenizer.json", empty)
        assert "tokenizer.json" in refusal(clip)

    def test_a_vocabulary_that_lacks_letters(self, clip):
        def shorten(tokenizer: dict) -> None:
            for letter in "qz":
                del tokenizer["model"]["vocab"][letter]

        change_json(clip / "tokenizer.json", shorten)
        assert "unknown" in refusal(clip)

    def test_one_of_a_larger_model(self, clip):
        larger = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
        change_json(clip / "tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].update(larger))
        message = refusal(clip)
        assert "49407" in message
        assert "514" in message

    def test_one_that_ends_captions_otherwise_than_the_tower_reads_them(self, clip):
        change_json(clip / "config.json", lambda config: config["text_config"].update(eos_token_id=17))
        message = refusal(clip)
        assert "ends captions with token 513" in message
        assert "17" in message

    def test_a_vocabulary_that_is_padded_is_fine(self, clip):
        expected = scores(clip)
        change_json(clip / "config.json", lambda config: config["text_config"].update(vocab_size=640))

        def pad(weights: dict) -> None:
            name = "text_model.embeddings.token_embedding.weight"
            weights[name] = torch.cat([weights[name], torch.ones(640 - len(weights[name]), weights[name].shape[1])])

        change_weights(clip / "model.safetensors", pad)
        assert torch.equal(scores(clip), expected)

    def test_a_config_that_is_older_than_the_rule_for_end_tokens(self, clip):
        expected = scores(clip)
        change_json(clip / "config.json", lambda config: config["text_config"].update(eos_token_id=2))
        assert torch.equal(scores(clip), expected)

    @pytest.mark.parametrize("content", ["", "[]", '{"model": 1}', "not json"])
    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
    def test_files_that_hold_something_else_are_named(self, clip, file, content):
        if (file, content) != ("tokenizer_config.json", '{"model": 1}'):  # which is one that gives little
            (clip / file).write_text(content)
            assert file in refusal(clip)


#: What can't be the value of most settings.
ODD_VALUES = st.sampled_from([None, "abc", -1, 0, 1000, [1, 2], {}])


@settings(max_examples=60)
@given(st.data())
def test_settings_that_cannot_be_are_refused_in_one_line(clip_folder, tmp_path_factory, data):
    folder = shutil.copytree(clip_folder, tmp_path_factory.mktemp("odd") / "clip")
    file = folder / data.draw(st.sampled_from(["config.json", "processor_config.json", "tokenizer_config.json"]))
    content = json.loads(file.read_bytes())
    part = data.draw(st.sampled_from([content, *(value for value in content.values() if isinstance(value, dict))]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(ODD_VALUES)
    file.write_text(json.dumps(content))
    try:
        ClipScorer(folder, device="cpu")
    except ModelError as error:
        message = str(error)
        assert "\n" not in message and str(folder) in message  # noqa: PT018


def test_a_setting_that_the_library_does_not_know_is_no_bare_word(clip):
    change_json(clip / "config.json", lambda config: config["text_config"].update(hidden_act="swishy"))
    assert "hold a setting that can't be used, or lack one: 'swishy'" in refusal(clip)


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_means_may_be_whole_numbers(kind, tmp_path):
    make, prefix = FOLDERS[kind]
    folder = make(tmp_path / "model")
    if kind == "clip":
        whole = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
        change_json(folder / "processor_config.json", lambda config: config["image_processor"].update(whole))
    else:
        whole = {"mean": [0, 0, 0], "std": [1, 1, 1]}
        change_json(folder / "open_clip_config.json", lambda config: config["preprocess_cfg"].update(whole))
    assert scores(f"{prefix}{folder}").isfinite().all()
