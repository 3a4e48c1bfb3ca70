import copy
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter_wds.models.encoder import ExactEncoder
from clipfilter_wds.models.fast.buckets import ROW_COUNTS, caption_lengths, row_count
from clipfilter_wds.models.graphed_encoder import GraphedEncoder
from clipfilter_wds.models.loading import load_model
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.preprocess.tokens import NO_CAPTION
from clipfilter_wds.scores.kind import COSINES
from tests.support.dual_encoders import FAMILIES
from tests.support.graphs import CpuGraphs, NoGraphs
from tests.support.toys import encoded, make_clip, photo

CPU = torch.device("cpu")
SOME_FAMILIES = ["chinese_clip", "siglip", "altclip"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough for the errors of low precision to be those of real models."""
    return make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, None)


@pytest.fixture(scope="module")
def exact(folder):
    return ClipScorer(folder, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def inputs(exact):
    """48 different pairs, with captions of 10 to 77 tokens, one of which comes often."""
    captions = [f"{'word ' * (seed % 14)}number {seed}" if seed % 4 else "the same again" for seed in range(48)]
    return batch_of(exact, captions)


def batch_of(scorer, captions):
    pairs = [scorer.preprocess.open_pair(encoded(photo(seed)), caption) for seed, caption in enumerate(captions)]
    pixel_values, tokens = scorer.preprocess.collate(pairs)
    return pixel_values, tokens.input_ids


def shapes_of(encoder, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that towers are called with."""
    shapes, towers = [], encoder.towers
    for name in ("image_features", "text_features"):
        features = getattr(towers, name)
        watched = lambda rows, features=features: shapes.append(tuple(rows.shape)) or features(rows)  # noqa: E731
        monkeypatch.setattr(towers, name, watched)
    return shapes


@pytest.mark.parametrize("graphs", [CpuGraphs, NoGraphs])
@pytest.mark.parametrize("flip", [False, True])
def test_in_float32_scores_are_those_of_batches_that_are_not_filled_up(loaded, folder, inputs, graphs, flip):
    encoder = GraphedEncoder(loaded, flip=flip, dtype=torch.float32, graphs=graphs())
    scorer = ClipScorer(folder, device="cpu", precision="fp32", flip=flip)
    expected = scorer(*inputs)
    scorer.fast = encoder.eval()
    for size in (48, 21):
        batches = zip(*(part.split(size) for part in inputs), strict=True)
        scores = torch.cat([scorer(*batch) for batch in batches])
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_captions_of_other_families_are_filled_up_too(family, tmp_path):
    make, _, prefix = FAMILIES[family]
    model = prefix + str(make(tmp_path / "model"))
    scorer = ClipScorer(model, device="cpu", precision="fp32")
    batch = batch_of(scorer, [f"{'red ' * (seed % 5)}{seed}" for seed in range(13)])
    expected = scorer(*batch)
    scorer.fast = GraphedEncoder(load_model(model, None), flip=False, dtype=torch.float32, graphs=CpuGraphs()).eval()
    torch.testing.assert_close(scorer(*batch), expected, rtol=0, atol=1e-5)


def test_shapes_are_few_whatever_the_batches(loaded, inputs, monkeypatch):
    encoder = GraphedEncoder(loaded, flip=False, dtype=torch.bfloat16, graphs=NoGraphs()).eval()
    shapes = shapes_of(encoder, monkeypatch)
    for size in (1, 7, 20, 48):
        encoder(*(part[:size] for part in inputs))
    images = {shape[0] for shape in shapes if len(shape) == 4}
    captions = {shape for shape in shapes if len(shape) == 2}
    assert images == {8, 32, 64}
    assert {num_rows for num_rows, _ in captions} <= set(ROW_COUNTS)
    assert {length for _, length in captions} <= set(caption_lengths(77, pads_to_max=False))


def test_equal_captions_are_encoded_once(loaded, inputs, monkeypatch):
    encoder = GraphedEncoder(loaded, flip=False, dtype=torch.float32, graphs=NoGraphs()).eval()
    shapes = shapes_of(encoder, monkeypatch)
    embeds = encoder.encode_text(inputs[1][:1].repeat(100, 1))
    assert [num_rows for num_rows, _ in shapes] == [8]
    assert embeds.shape[0] == 100
    assert (embeds == embeds[0]).all()


@pytest.fixture(scope="module")
def float32(loaded, inputs):
    """An encoder, and the embeddings of all inputs."""
    encoder = GraphedEncoder(loaded, flip=False, dtype=torch.float32, graphs=CpuGraphs()).eval()
    return encoder, encoder(*inputs)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 47), min_size=1, max_size=40))
def test_every_embedding_is_that_of_its_row(float32, inputs, rows):
    encoder, all_embeds = float32
    embeds = encoder(*(part[rows] for part in inputs))
    for of_rows, of_all in zip(embeds, all_embeds, strict=True):
        torch.testing.assert_close(of_rows, of_all[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_captions", [1, 2])
def test_decisions_are_those_of_float32(folder, loaded, exact, inputs, num_captions):
    pixel_values, input_ids = inputs
    if num_captions == 2:
        second = input_ids.roll(1, 0)
        second[::3] = NO_CAPTION
        input_ids = torch.stack([input_ids, second], dim=1)
    scorer = ClipScorer(folder, device="cpu", precision="bf16")
    scorer.fast = GraphedEncoder(loaded, flip=False, dtype=torch.bfloat16, graphs=CpuGraphs()).eval()
    reference = exact(pixel_values, input_ids).numpy()
    assert not np.array_equal(scorer(pixel_values, input_ids).numpy(), reference)
    for threshold in np.sort(reference[reference > 0])[::16].tolist():
        recheck = Recheck(scorer, threshold)
        batches = zip(pixel_values.split(20), input_ids.split(20), strict=True)
        scores = [
            scores.scores for _, scores in recheck.map(batches, lambda batch: batch, lambda batch, may_be_kept: None)
        ]
        kept = COSINES.passes(np.concatenate(scores), threshold)
        np.testing.assert_array_equal(kept, COSINES.passes(reference, threshold))


def test_the_float32_towers_can_be_captured_too(loaded, inputs):
    graphs = CpuGraphs()
    eager, graphed = (ExactEncoder(copy.deepcopy(loaded), CPU, flip=False, graphs=of) for of in (None, graphs))
    for size in (48, 7):
        batch = [part[:size] for part in inputs]
        for found, expected in zip(graphed(*batch), eager(*batch), strict=True):
            assert torch.equal(found, expected)
    assert graphs.num_replays > graphs.num_captures > 0


def test_after_warming_up_nothing_more_is_captured(folder, loaded, inputs):
    graphs = CpuGraphs()
    scorer = ClipScorer(folder, device="cpu", precision="bf16")
    scorer.warm_up(48)  # nothing to do without graphs
    scorer.exact = ExactEncoder(copy.deepcopy(loaded), CPU, flip=False, graphs=graphs).eval()
    scorer.fast = GraphedEncoder(loaded, flip=False, dtype=torch.bfloat16, graphs=graphs).eval()
    scorer.warm_up(20)
    num_captures, fast_counts = graphs.num_captures, [count for count in ROW_COUNTS if count <= row_count(20)]
    assert num_captures == (1 + 3) + len(fast_counts) * (1 + 5)
    for size in (20, 9):
        batch = [part[:size] for part in inputs]
        scorer(*batch)
        scorer.exact.encode_image(batch[0][:8])
        scorer.exact.encode_text(batch[1][:8])
    assert graphs.num_captures == num_captures


@pytest.mark.parametrize("family", ["siglip", "open_clip, averaged"])
def test_towers_that_take_captions_of_full_length_only_are_warmed_up_with_these(family, tmp_path, monkeypatch):
    monkeypatch.setattr("clipfilter_wds.models.encoder._EXACT_TOKENS", 8)  # less than these toys take
    make, _, prefix = FAMILIES[family]
    loaded, graphs = load_model(prefix + str(make(tmp_path / "model")), None), CpuGraphs()
    ExactEncoder(loaded, CPU, flip=False, graphs=graphs).warm_up()
    assert graphs.num_captures == 2


def test_weights_that_move_are_captured_anew(loaded, inputs):
    graphs = CpuGraphs()
    encoder = GraphedEncoder(loaded, flip=False, dtype=torch.float32, graphs=graphs).eval()
    encoder(*inputs)
    before = graphs.num_captures
    encoder.to("cpu")
    encoder(*inputs)
    assert graphs.num_captures == 2 * before


def test_captions_longer_than_the_tower_takes_are_refused_as_elsewhere(loaded):
    encoder = GraphedEncoder(loaded, flip=False, dtype=torch.float32, graphs=NoGraphs()).eval()
    with pytest.raises(ValueError, match="77"):
        encoder.encode_text(torch.ones(2, 90, dtype=torch.int64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
    def test_graphs_give_the_scores_of_launched_layers(self, folder, exact, inputs, precision):
        graphed, launched = (
            ClipScorer(folder, device="cuda", precision=precision, cuda_graphs=cuda_graphs)
            for cuda_graphs in (True, False)
        )
        assert graphed.exact.is_graphed > launched.exact.is_graphed
        error = (launched(*inputs).cpu() - exact(*inputs)).abs().max().item()
        for size in (48, 40, 33, 48, 5):
            batch = [part[:size] for part in inputs]
            for _ in range(2):
                found = graphed(*batch).cpu()
                torch.testing.assert_close(found, exact(*batch), rtol=0, atol=max(2 * error, 1e-5))
                torch.testing.assert_close(graphed(*batch, exact=True).cpu(), exact(*batch), rtol=0, atol=1e-5)

    def test_decisions_are_those_of_float32(self, folder, exact, inputs):
        scorer = ClipScorer(folder, device="cuda", precision="fp16")
        reference = exact(*inputs).numpy()
        ranked = np.sort(reference[reference > 0])
        for threshold in ((ranked[1:] + ranked[:-1]) / 2)[np.diff(ranked) > 1e-5][::8].tolist():
            scores = Recheck(scorer, threshold)(*inputs).scores
            np.testing.assert_array_equal(COSINES.passes(scores, threshold), COSINES.passes(reference, threshold))

    @pytest.mark.parametrize("num_captions", [1, 2])
    def test_a_batch_is_given_to_the_gpu_without_waiting_for_it(self, folder, inputs, num_captions):
        pixel_values, input_ids = inputs
        if num_captions == 2:
            input_ids = torch.stack([input_ids, torch.full_like(input_ids, NO_CAPTION)], dim=1)
            input_ids[::3, 1] = input_ids[::3, 0].roll(1, 0)
        scorer = ClipScorer(folder, device="cuda", precision="fp16")
        scores = scorer(pixel_values, input_ids)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = scorer(pixel_values, input_ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again, scores)

    def test_captions_that_are_on_the_gpu_already_are_left_there(self, folder, inputs):
        scorer = ClipScorer(folder, device="cuda", precision="fp16")
        on_gpu = [part.cuda() for part in inputs]
        scorer(*on_gpu)
        torch.cuda.set_sync_debug_mode("error")
        try:
            scores = scorer(*on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(scores, scorer(*inputs), rtol=0, atol=1e-3)

    def test_threads_on_streams_of_their_own_get_their_scores(self, folder, inputs):
        scorer = ClipScorer(folder, device="cuda", precision="fp16")
        scorer.warm_up(48)
        expected, wrong = scorer(*inputs), []

        def score(start: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    scores = scorer(*(part[start : start + 20] for part in inputs))
                    if (scores - expected[start : start + 20]).abs().max() > 1e-3:
                        wrong.append(start)

        threads = [threading.Thread(target=score, args=(start,)) for start in (0, 10, 28)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_a_forward_pass_costs_the_host_less_than_a_millisecond(self, tmp_path):
        """CPU time of this thread, so that it does not matter how busy the machine is; as many layers as a ViT-B."""
        scorer = ClipScorer(make_clip(tmp_path, width=256, layers=12), device="cuda", precision="fp16")
        pixel_values, input_ids = batch_of(scorer, [f"{'word ' * (seed % 14)}{seed}" for seed in range(256)])
        pixel_values = pixel_values.pin_memory()  # as a loader does, elsewhere
        times = []
        for _ in range(20):
            before = time.thread_time()
            scores = scorer(pixel_values, input_ids)
            times.append(time.thread_time() - before)
            scores.cpu()
        assert sorted(times)[10] < 1e-3, times

    def test_a_thread_beside_training_with_tf32_decides_in_float32(self, folder, exact, inputs):
        torch.set_float32_matmul_precision("high")
        try:
            scorer = ClipScorer(folder, device="cuda", precision="fp16")
            found = []
            thread = threading.Thread(target=lambda: found.append(scorer(*inputs, exact=True).cpu()))
            thread.start()
            thread.join()
            torch.testing.assert_close(found[0], exact(*inputs), rtol=0, atol=1e-5)
        finally:
            torch.set_float32_matmul_precision("highest")
