"""Which embeddings go with which scores: what was embedded must be what was scored, as far as the method uses it."""

import numpy as np
import pytest

from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig
from clipfilter_wds.offline.rescoring.run import rescore_shards
from tests.support.embeddings import pair_embeddings, write_scored
from tests.support.score_tables import FINGERPRINT

MADE = {
    **FINGERPRINT,
    "score": "cosine",
    "resampler": "torchvision",
    "fast_decode": False,
    "max_pixels": 1000,
    "max_member_bytes": 1000,
    "tokenizer": "2" * 64,
    "max_tokens": 32,
    "pads_to_max": False,
    "policy": 1,
    "precision": "fp32",
    "reduce": "max",
    "flip": False,
    "caption": "txt",
}
OF_CAPTIONS = [
    ("caption", "json:alt"),
    ("tokenizer", "3" * 64),
    ("max_tokens", 77),
    ("pads_to_max", True),
    ("reduce", "mean"),
    ("max_text_bytes", 10),
]
OF_IMAGES = [
    ("resize", 64),
    ("crop", [31, 32]),
    ("mean", [0.0, 0.0]),
    ("resampler", "pillow"),
    ("fast_decode", True),
    ("flip", True),
    ("policy", 2),
    ("unheard_of", 1),
]
OF_DATA_SETS = [("image", "png"), ("max_pixels", 10), ("max_member_bytes", 10), ("subset", "d" * 64)]
OF_NONE = [
    ("precision", "bf16"),
    ("resize_on_device", True),
    ("score", "neg_clip_loss"),
    ("derived", {"method": "sum"}),
    ("model", "/moved/m"),
]


def scored(folder, **changes):
    """A shard, always the same samples, made with these settings."""
    pairs = {"0": pair_embeddings(np.random.default_rng(0), 12, 8)}
    return write_scored(folder, pairs, fingerprint={**MADE, **changes})


class Runs:
    """Each method with embeddings of these settings, where the scores have the usual ones."""

    def __init__(self, folder, **changes):
        self.output = folder / "out"
        self.scores, self.there = scored(folder / "here"), scored(folder / "there", **changes)

    def neg_clip_loss(self):
        return self._rescore(method="neg_clip_loss", embeddings=self.there)

    def norm_sim(self):
        return self._rescore(method="norm_sim_inf", embeddings=self.there, target=self.there)

    def target(self):
        return self._rescore(method="norm_sim_inf", target=self.there)

    def dedup(self):
        return rescore_shards(DedupConfig(scores=self.scores, output=self.output, embeddings=self.there))

    def _rescore(self, **options):
        return rescore_shards(RescoreConfig(scores=self.scores, output=self.output, **options))


def refused(name) -> str:
    return rf"there', where the .*embeddings are, was written with other settings \({name}.*; score with the same"


@pytest.mark.parametrize(("name", "value"), [*OF_CAPTIONS, *OF_IMAGES, *OF_DATA_SETS])
def test_a_score_of_images_and_captions_takes_embeddings_of_the_same(tmp_path, name, value):
    with pytest.raises(ValueError, match=refused(name)):
        Runs(tmp_path, **{name: value}).neg_clip_loss()


def test_other_captions_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"\(caption json:alt there, txt here\)"):
        Runs(tmp_path, caption="json:alt").neg_clip_loss()


@pytest.mark.parametrize("method", [Runs.norm_sim, Runs.dedup])
@pytest.mark.parametrize(("name", "value"), [*OF_IMAGES, *OF_DATA_SETS])
def test_what_looks_at_images_alone_takes_embeddings_of_the_same_images(tmp_path, method, name, value):
    with pytest.raises(ValueError, match=refused(name)):
        method(Runs(tmp_path, **{name: value}))


@pytest.mark.parametrize("method", [Runs.norm_sim, Runs.dedup])
@pytest.mark.parametrize(("name", "value"), OF_CAPTIONS)
def test_what_looks_at_images_alone_takes_embeddings_with_other_captions(tmp_path, method, name, value):
    assert method(Runs(tmp_path, **{name: value})).done == 1


@pytest.mark.parametrize(("name", "value"), OF_IMAGES)
def test_a_target_is_of_images_that_were_prepared_alike(tmp_path, name, value):
    with pytest.raises(ValueError, match=refused(name)):
        Runs(tmp_path, **{name: value}).target()


@pytest.mark.parametrize(("name", "value"), [*OF_CAPTIONS, *OF_DATA_SETS, ("limit", 3)])
def test_a_target_is_another_data_set(tmp_path, name, value):
    assert Runs(tmp_path, **{name: value}).target().done == 1


@pytest.mark.parametrize("method", [Runs.neg_clip_loss, Runs.norm_sim, Runs.target, Runs.dedup])
@pytest.mark.parametrize(("name", "value"), OF_NONE)
def test_what_changes_no_embedding_may_differ(tmp_path, method, name, value):
    assert method(Runs(tmp_path, **{name: value})).done == 1


@pytest.mark.parametrize("method", [Runs.neg_clip_loss, Runs.norm_sim, Runs.target, Runs.dedup])
def test_embeddings_of_another_model_are_refused_by_every_method(tmp_path, method):
    with pytest.raises(ValueError, match="embeddings are of another model, 'n'; score with 'm' and --embeddings there"):
        method(Runs(tmp_path, model="n", weights="1" * 64))


@pytest.mark.parametrize("method", [Runs.neg_clip_loss, Runs.norm_sim, Runs.dedup])
def test_embeddings_of_all_samples_serve_the_scores_of_a_subset(tmp_path, method):
    runs = Runs(tmp_path)
    scored(runs.scores, subset="d" * 64)
    assert method(runs).done == 1
