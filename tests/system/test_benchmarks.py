"""The benchmarks run, everyone in them keeps the same pairs, and what they report adds up."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from benchmarks.inline import repeats_for
from benchmarks.limits import image_flops, text_flops
from benchmarks.material import make_data, make_model
from benchmarks.rounds import Contender, Outcome, Spread, in_turns, ratios
from clipfilter_wds import ClipScorer
from tests.support.pace import FOREVER
from tests.support.processes import in_fresh_process

SHORT = ["--size=tiny", "--image_size=64", "--num_samples=64", "--batch_size=8", "--num_workers=1", "--rounds=1"]


def run(folder: Path, *names: str, timeout: float = FOREVER) -> dict:
    args = [*names, *SHORT, "--device=cpu", f"--output={folder}", f"--cache={folder}/cache"]
    in_fresh_process(_main, args, timeout=timeout)
    return json.loads((folder / "results.json").read_text())


def _main(args: list[str]) -> None:
    from benchmarks.run import main

    main(args)


@pytest.mark.slow
def test_short_run_of_the_speed_benchmark(tmp_path):
    """A contender that decides otherwise than the float32 loop would end it with an error."""
    speed = run(tmp_path)["speed"]
    rows = {row["name"]: row for row in speed["rows"]}
    ours = {"rewrite", "inline loader", "table", "rewrite --scores"}
    assert ours | {"decode, one core", "cp"} <= rows.keys()
    assert "webdataset loop, bf16" not in rows  # nor is the scorer in bf16, with a model that small
    best = max(rows[f"{loop} loop, fp32"]["rate"]["median"] for loop in ("operator's", "webdataset"))
    assert rows["rewrite"]["ratio"]["median"] == pytest.approx(rows["rewrite"]["rate"]["median"] / best)
    limit = speed["limits"]["limit"][0]
    assert rows["rewrite"]["share"]["median"] == pytest.approx(rows["rewrite"]["rate"]["median"] / limit)
    assert speed["flops_per_sample"] > 1e6
    assert (tmp_path / "speed.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_short_run_of_the_other_benchmarks(tmp_path):
    results = run(tmp_path, "workers", "inline", "length", timeout=800)
    assert next(row["name"] for row in results["workers"]["rows"]) == "0 workers"
    assert [row["cost"] for row in results["inline"]["rows"]] == ["1x", "4x", "16x"]
    assert [row["samples"] for row in results["length"]["rows"]] == [64, 128]
    assert all(row["peak"] > 100 for row in results["length"]["rows"])


def test_samples_of_a_smaller_number_are_the_first_of_a_larger(tmp_path):
    few, many = (make_data(tmp_path, num_samples=number, image_size=16) for number in (5, 70))
    first = [(image.read_bytes(), caption) for image, caption in many.rows[:5]]
    assert [(image.read_bytes(), caption) for image, caption in few.rows] == first


def test_random_models_have_captions_of_10_to_29_tokens_and_scores_above_the_clip(tmp_path):
    scorer = ClipScorer(make_model(tmp_path, "tiny"), device="cpu")
    data = make_data(tmp_path, num_samples=256, image_size=64)
    pixels, tokens = scorer.preprocess.collate(
        [scorer.preprocess.open_pair(image.read_bytes(), caption) for image, caption in data.rows]
    )
    assert (min(tokens.num_tokens), max(tokens.num_tokens)) == (10, 29)
    assert scorer(pixels, tokens.input_ids).median() > 0


def test_operations_are_those_that_one_counts_by_hand(tmp_path):
    """Attention, as products of matrices, included, whichever kernel there would be for it."""
    model = CLIPModel.from_pretrained(make_model(tmp_path, "tiny")).eval()
    width, inner, layers, projection, patch = 32, 64, 2, 32, 16
    images, texts = 2 * 2 + 1, 7

    def of_tower(tokens: int) -> int:
        linear, attention = 4 * width * width + 2 * width * inner, 2 * tokens * width
        return 2 * layers * tokens * (linear + attention) + 2 * width * projection

    of_patches = 2 * (images - 1) * 3 * patch * patch * width
    assert image_flops(model, (32, 32)) == of_tower(images) + of_patches
    assert text_flops(model, torch.ones(1, texts, dtype=torch.int64)) == of_tower(texts)


def test_a_training_step_is_as_long_as_wanted_though_one_repeat_alone_takes_longer():
    taken = []

    def seconds_of(repeats: int) -> float:
        taken.append(repeats)
        return 0.5 + repeats

    assert 90 <= repeats_for(100.0, seconds_of) <= 100
    assert max(taken) <= 8
    assert repeats_for(3.0, seconds_of) == 2
    assert repeats_for(0.1, seconds_of) == 1


def test_turns_alternate_and_ratios_are_taken_within_each_round():
    turns = []
    contenders = [
        Contender(name, lambda share, name=name: turns.append((name, share)) or Outcome(1), share=share)
        for name, share in (("slow", 0.25), ("fast", 1.0))
    ]
    rates, _ = in_turns(contenders, lambda share: share, rounds=2)
    assert turns == [("slow", 1 / 32), ("fast", 1 / 8)] + [("slow", 0.25), ("fast", 1.0)] * 2
    assert [len(values) for values in rates.values()] == [2, 2]
    assert ratios([2.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)
