import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipfilter_wds.models import recheck as recheck_module
from clipfilter_wds.models.recheck import NUM_MEASURED, Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.preprocess.tokens import NO_CAPTION
from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from tests.support.toys import encoded, make_clip, pair, photo, write_shard

LOW = ["bf16", "fp16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough for the errors of low precision to be those of real models: about 1e-3."""
    return make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)


@pytest.fixture(scope="module", params=LOW)
def fast(request, folder):
    return ClipScorer(folder, device="cpu", precision=request.param)


@pytest.fixture(scope="module")
def bf16(folder):
    return ClipScorer(folder, device="cpu", precision="bf16")


@pytest.fixture(scope="module")
def exact(folder):
    return ClipScorer(folder, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def inputs(exact):
    """A batch of 96 different pairs, one of whose captions comes often."""
    captions = [f"{'word ' * (seed % 9)}number {seed}" if seed % 4 else "the same again" for seed in range(96)]
    pairs = [exact.preprocess.open_pair(encoded(photo(seed)), caption) for seed, caption in enumerate(captions)]
    pixel_values, tokens = exact.preprocess.collate(pairs)
    return pixel_values, tokens.input_ids


def batches_of(inputs, size):
    return zip(*(part.split(size) for part in inputs), strict=True)


def test_low_precision_scores_are_near_and_not_equal(fast, exact, inputs):
    error = (fast(*inputs) - exact(*inputs)).abs().max().item()
    assert 0 < error < 0.02
    assert torch.equal(fast(*inputs, exact=True), exact(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_embeddings_are_those_of_the_fast_pass_whatever_is_computed_again(bf16, inputs, dtype):
    recheck, without = Recheck(bf16, 0.1, embeddings=dtype), Recheck(bf16, 0.1)
    for batch in batches_of(inputs, 32):
        found = recheck(*batch)
        images, captions = bf16.fast(*batch)
        assert found.num_rechecked
        assert torch.from_numpy(found.embeddings).dtype == dtype
        expected = torch.stack([images, captions])
        tolerance = {"atol": 1e-3, "rtol": 0} if dtype == torch.float16 else {"atol": 1e-6, "rtol": 0}
        torch.testing.assert_close(torch.from_numpy(found.embeddings).float(), expected, **tolerance)
        np.testing.assert_array_equal(found.scores, without(*batch).scores)
    assert without(*inputs).embeddings is None


def test_decisions_equal_float32s_at_thresholds_that_lie_on_its_scores(bf16, exact, inputs):
    reference = exact(*inputs).numpy()
    thresholds = [float(value) for value in reference if value > 0][:12]
    fast_scores = bf16(*inputs).numpy()
    num_different = num_rechecked = 0
    for threshold in [*thresholds, *np.nextafter(np.float32(thresholds[:2]), np.float32(2)).tolist()]:
        recheck = Recheck(bf16, threshold)
        batches = [recheck(*batch) for batch in batches_of(inputs, 32)]
        scores = np.concatenate([batch.scores for batch in batches])
        np.testing.assert_array_equal(COSINES.passes(scores, threshold), COSINES.passes(reference, threshold))
        num_different += (COSINES.passes(fast_scores, threshold) != COSINES.passes(reference, threshold)).sum()
        num_rechecked += sum(batch.num_rechecked for batch in batches)
    assert num_different  # the fast scores alone would have decided otherwise
    assert num_rechecked < len(thresholds) * len(reference) / 2


def test_the_band_is_twice_the_largest_error_of_the_first_samples_and_covers_the_others(fast, exact, inputs):
    recheck = Recheck(fast, 0.25)
    assert recheck.band == 2.0  # nothing is known yet: everything would be rechecked
    recheck.measure(*(part[:NUM_MEASURED] for part in inputs))
    images = [scorer.fast.encode_image(inputs[0][:NUM_MEASURED]) for scorer in (fast, exact)]
    texts = [scorer.fast.encode_text(inputs[1][:NUM_MEASURED]) for scorer in (fast, exact)]
    largest = (images[0] @ texts[0].T - images[1] @ texts[1].T).abs().max().item()
    assert recheck.band == pytest.approx(2 * largest, rel=1e-5)
    assert (fast(*inputs) - exact(*inputs)).abs().max().item() < recheck.band


def test_everything_is_rechecked_until_enough_samples_were_seen(bf16, exact, inputs):
    recheck = Recheck(bf16, 0.9)
    few = [part[:20] for part in inputs]
    first = recheck(*few)
    assert first.num_rechecked == 20
    np.testing.assert_array_equal(first.scores, exact(*few).numpy())
    assert recheck(*few).num_rechecked == 0  # 0.9 lies far from all scores
    assert recheck.is_measured


def test_an_audit_that_finds_a_larger_error_widens_the_band(bf16, exact, inputs, monkeypatch):
    monkeypatch.setattr(recheck_module, "_AUDITED", 1.0)
    recheck = Recheck(bf16, 0.9)
    same = [part[:1].repeat(NUM_MEASURED, *[1] * (part.ndim - 1)) for part in inputs]
    recheck.measure(*same)  # one pair only, so that its error says little of other pairs'
    narrow = recheck.band
    scores = recheck(*inputs)
    errors = np.abs(bf16(*inputs).numpy() - exact(*inputs).numpy())
    assert errors.max() > narrow
    assert errors.max() <= 0.75 * recheck.band
    assert scores.num_rechecked == 0
    np.testing.assert_array_equal(scores.scores, bf16(*inputs).numpy())  # an audit changes no score


@pytest.fixture
def sizes(bf16, monkeypatch):
    """How many captions, and how many images, are computed in float32 each time."""
    sizes = {"captions": [], "images": []}
    captions, images = bf16.exact.encode_text, bf16.exact.encode_image

    def encode_text(input_ids, **options):
        sizes["captions"].append(len(input_ids))
        return captions(input_ids, **options)

    def encode_image(pixel_values, **options):
        sizes["images"].append(len(pixel_values))
        return images(pixel_values, **options)

    monkeypatch.setattr(bf16.exact, "encode_text", encode_text)
    monkeypatch.setattr(bf16.exact, "encode_image", encode_image)
    return sizes


def measured(scorer, threshold, inputs, sizes) -> Recheck:
    recheck = Recheck(scorer, threshold)
    recheck.measure(*inputs)
    assert sizes == {"captions": [NUM_MEASURED], "images": [NUM_MEASURED]}
    for of_tower in sizes.values():
        of_tower.clear()
    return recheck


def test_what_is_computed_again_waits_until_it_fills_a_float32_batch(bf16, exact, inputs, monkeypatch, sizes):
    monkeypatch.setattr(recheck_module, "_MARGIN", 30.0)  # so that there is much to recheck
    threshold = float(np.sort(exact(*inputs).numpy())[48])
    recheck = measured(bf16, threshold, inputs, sizes)
    monkeypatch.setattr(bf16.exact, "batch_rows", 8)
    taken = []
    batches = (taken.append(number) or batch for number, batch in enumerate(batches_of(inputs, 6)))
    decided, waited = [], []
    for batch, scores in recheck.map(batches, lambda batch: batch, lambda batch, may_be_kept: batch):
        decided.append((batch[0], scores))
        waited.append(len(taken) - len(decided))
    assert torch.equal(torch.cat([pixels for pixels, _ in decided]), inputs[0])
    assert sum(sizes["captions"]) >= sum(scores.num_rechecked for _, scores in decided) > 32
    assert set(sizes["captions"][:-1]) == {8}
    assert 8 in sizes["images"]
    assert 0 < 6 * max(waited) <= recheck_module._MOST_WAITING
    decisions = np.concatenate([scores.scores for _, scores in decided]) >= threshold
    np.testing.assert_array_equal(decisions, exact(*inputs).numpy() >= threshold)


def test_an_image_is_computed_again_only_where_its_caption_does_not_decide(bf16, exact, inputs, sizes):
    reference, fast, image_embeds = exact(*inputs).numpy(), bf16(*inputs), bf16.fast.encode_image(inputs[0])
    with_captions = (image_embeds * exact.exact.encode_text(inputs[1])).sum(dim=-1).numpy()
    errors = [np.abs(scores - reference).max() for scores in (fast.numpy(), with_captions)]
    assert errors[1] < errors[0] / 2  # of this model, most of the error is the caption's
    threshold = float(with_captions[40])
    recheck = measured(bf16, threshold, inputs, sizes)
    scores = recheck(*inputs)
    assert scores.num_rechecked == sum(sizes["captions"]) > 2 * sum(sizes["images"]) > 0
    is_fast, is_half, is_exact = (scores.scores == of for of in (fast.numpy(), with_captions, reference))
    assert (is_fast | is_half | is_exact).all()
    assert is_exact[40]
    assert (is_half & ~is_fast & ~is_exact).any()
    np.testing.assert_array_equal(COSINES.passes(scores.scores, threshold), COSINES.passes(reference, threshold))


@pytest.mark.parametrize("options", [{"flip": True}, {"reduce": "min"}, {"reduce": "mean", "flip": True}])
def test_decisions_with_mirror_images_and_several_captions_are_float32s_too(folder, inputs, options):
    pixel_values, input_ids = (part[:64] for part in inputs)
    if "reduce" in options:
        second = input_ids.roll(1, 0)
        second[::3] = NO_CAPTION
        input_ids = torch.stack([input_ids, second], dim=1)
    fast, exact = (ClipScorer(folder, device="cpu", precision=precision, **options) for precision in ("bf16", "fp32"))
    reference = exact(pixel_values, input_ids).numpy()
    for threshold in np.sort(reference[reference > 0])[::16].tolist():
        scores = Recheck(fast, threshold)(pixel_values, input_ids)
        np.testing.assert_array_equal(COSINES.passes(scores.scores, threshold), COSINES.passes(reference, threshold))


def test_float32_has_no_band_and_rechecks_nothing(exact, inputs):
    recheck = Recheck(exact, 0.25)
    scores = recheck(*inputs)
    assert (recheck.band, scores.num_rechecked) == (0.0, 0)
    np.testing.assert_array_equal(scores.scores, exact(*inputs).numpy())


@pytest.mark.parametrize("threshold", [None, 0.0, -0.5])
def test_nothing_is_rechecked_where_nothing_is_decided(bf16, inputs, threshold):
    recheck = Recheck(bf16, threshold)
    recheck.measure(*inputs)
    assert recheck(*inputs).num_rechecked == 0


def test_what_overflows_in_fp16_is_rechecked(folder, inputs, tmp_path):
    model = make_clip(tmp_path, image_size=64, patch_size=16, width=256, seed=3)
    weights = load_file(model / "model.safetensors")
    for name in list(weights):
        if name.endswith("mlp.fc1.weight"):
            weights[name] *= 1e6
        if name.endswith("mlp.fc2.weight"):
            weights[name] *= 1e-6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    scorer = ClipScorer(model, device="cpu", precision="fp16")
    assert not torch.isfinite(scorer(*inputs)).all()
    rechecked = Recheck(scorer, None)(*inputs)
    np.testing.assert_array_equal(rechecked.scores, ClipScorer(model, device="cpu", precision="fp32")(*inputs).numpy())


def test_a_float32_score_does_not_depend_on_the_batch_around_it(exact, inputs):
    together = exact(*inputs)
    for rows in ([5], [70, 3], list(range(10, 31)), list(range(95, -1, -1))):
        assert torch.equal(exact(*(part[rows] for part in inputs)), together[rows])


def test_equal_captions_are_encoded_once_and_every_caption_only_as_far_as_it_goes(bf16, inputs, monkeypatch):
    shapes = []
    towers = bf16.fast.towers
    encode = towers.text_features
    monkeypatch.setattr(towers, "text_features", lambda ids: shapes.append(ids.shape) or encode(ids))
    bf16.fast.encode_text(inputs[1])
    assert sum(num_rows for num_rows, _ in shapes) == len(torch.unique(inputs[1], dim=0)) == 73
    assert [length for _, length in shapes] == sorted(length for _, length in shapes)
    assert shapes[0][1] < inputs[1].shape[1] == shapes[-1][1]


def test_small_models_stay_in_float32(clip_folder):
    assert ClipScorer(clip_folder, device="cpu").precision == "fp32"


class TestRuns:
    @pytest.fixture(scope="class")
    @classmethod
    def shards(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("shards")
        return [
            write_shard(folder / f"{shard:05d}.tar", [pair(100 * shard + number) for number in range(40)])
            for shard in range(3)
        ]

    @pytest.fixture(scope="class")
    @classmethod
    def threshold(cls, exact, shards, tmp_path_factory):
        """A threshold on a score, with others close to it."""
        run(exact, shards, output := tmp_path_factory.mktemp("exact"), threshold=0.0)
        scores = [ShardScores.read(path).scores for path in (output / "_scores").glob("*.parquet")]
        threshold = float(np.sort(np.concatenate(scores))[-12])
        assert threshold > 0
        return threshold

    def test_a_run_in_low_precision_writes_what_one_in_float32_writes(self, bf16, exact, shards, threshold, tmp_path):
        expected = run(exact, shards, tmp_path / "exact", threshold=threshold)
        summary = run(bf16, shards, tmp_path / "fast", threshold=threshold)
        assert tars(tmp_path / "fast") == tars(tmp_path / "exact")
        assert (expected["band"], expected["rechecked"]) == (0.0, 0)
        assert 0 < summary["band"] < 0.05
        assert 0 < summary["rechecked"] < 60
        tables = [ShardScores.read(path) for path in (tmp_path / "fast" / "_scores").glob("*.parquet")]
        assert sum(table.metadata.rechecked for table in tables) == summary["rechecked"]
        assert {table.metadata.band for table in tables} == {summary["band"]}

    def test_a_resumed_run_has_the_same_bits_whatever_its_workers(self, bf16, shards, threshold, tmp_path):
        run(bf16, shards, tmp_path / "whole", threshold=threshold)
        run(bf16, shards, tmp_path / "resumed", threshold=threshold, num_workers=2)
        for name in ("00001.tar", "00001_stats.json", "_scores/00001.parquet", "summary.json"):
            (tmp_path / "resumed" / name).unlink()
        summary = run(bf16, shards, tmp_path / "resumed", threshold=threshold)
        assert summary["resumed_shards"] == 2
        for path in sorted((tmp_path / "whole").rglob("*.*")):
            if path.name != "summary.json":
                assert path.read_bytes() == (tmp_path / "resumed" / path.relative_to(tmp_path / "whole")).read_bytes()

    def test_the_loader_keeps_what_float32_keeps(self, bf16, exact, shards, threshold):
        kept = []
        for scorer in (bf16, exact):
            dataset = ClipWebDataset(shards, scorer.preprocess)
            loader = ClipFilterLoader(dataset, scorer, threshold=threshold, batch_size=16, score_batch_size=32)
            kept.append([key for batch in loader for key in zip(batch["__url__"], batch["__key__"], strict=True)])
        assert kept[0] == kept[1]
        assert 0 < len(kept[0]) < 120


def run(scorer, shards, output, **options) -> dict:
    config = RewriteConfig(shards=shards, output=output, **{"batch_size": 16, "num_workers": 0, **options})
    process_shards(config, scorer)
    return json.loads((output / "summary.json").read_bytes())


def tars(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}
