"""Memory that really runs out: a limit of the process on a CPU, of torch's allocator on a GPU."""

import re
import resource
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from clipfilter_wds.models.dual_encoder import ModelError
from clipfilter_wds.models.out_of_memory import BatchTooLargeError, memory_for
from clipfilter_wds.models.recheck import NUM_MEASURED, Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.run import process_shards
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from tests.support.gpu import DEVICES, fast_precision
from tests.support.processes import in_fresh_process
from tests.support.toys import make_clip, pair, write_shard

#: Samples of a batch that does not fit on a GPU, where the layers take gigabytes for it. A CPU takes 32 at a time, and
#: has no room for these.
BATCH_SIZE = 512
#: What a process may have more than it has with the model loaded.
ROOM = {"cpu": 32 << 20, "cuda": 512 << 20}
#: Of a loader: one whose pixels do fit.
SCORE_BATCH_SIZE = {"cpu": 64, "cuda": BATCH_SIZE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sees 196 patches of an image in wide layers: what one of them gives for 32 images takes 50 MB or more."""
    return make_clip(tmp_path_factory.mktemp("model"), image_size=224, patch_size=16, width=1024)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("in") / "0.tar", map(pair, range(BATCH_SIZE)))


def limit_memory(device: str, room: int | None = None) -> None:
    """Leave this process no room for the activations of a large batch."""
    room = ROOM[device] if room is None else room
    if device == "cuda":
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        return
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + room, resource.RLIM_INFINITY))


def message_of(work, folder, device, *args) -> tuple[str, str]:
    """What is raised, and the kind of its cause."""
    scorer = ClipScorer(folder, device=device, precision=fast_precision(device))
    with pytest.raises(BatchTooLargeError) as caught:
        work(scorer, device, *args)
    return str(caught.value), type(caught.value.__cause__).__name__


def score(scorer, device):
    pixels = torch.zeros(BATCH_SIZE, 3, 224, 224, dtype=torch.uint8)
    tokens = scorer.preprocess.tokenize([[f"number {number}"] for number in range(BATCH_SIZE)])
    limit_memory(device)
    scorer(pixels, tokens.input_ids)


def recheck(scorer, device):
    pixels = torch.zeros(BATCH_SIZE, 3, 224, 224, dtype=torch.uint8)
    tokens = scorer.preprocess.tokenize([[f"number {number}"] for number in range(BATCH_SIZE)])
    measured = Recheck(scorer, 0.1)
    for few in range(0, NUM_MEASURED, 2):  # since what is freed again would leave room for as many
        measured.measure(pixels[few : few + 2], tokens.input_ids[few : few + 2])
    limit_memory(device)
    hold = lambda batch, may_be_kept: np.asarray(may_be_kept)  # noqa: E731
    list(measured.map([None], lambda _: (pixels, tokens.input_ids), hold))


def rewrite(scorer, device, shard, output):
    config = RewriteConfig(shards=[str(shard)], output=output, threshold=0.1, batch_size=BATCH_SIZE, num_workers=0)
    process_shards(config, scorer, on_progress=lambda tally: limit_memory(device))


def load(scorer, device, shard):
    # A GPU runs out as soon as graphs are captured; a CPU must have room for the thread that scores to begin.
    limit_once = cache(partial(limit_memory, device))
    if device == "cuda":
        limit_once()

    def train_view(image) -> int:
        limit_once()
        return image.width

    dataset = ClipWebDataset(str(shard), scorer.preprocess, image_transform=train_view)
    list(ClipFilterLoader(dataset, scorer, threshold=0.1, batch_size=8, score_batch_size=SCORE_BATCH_SIZE[device]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("work", [score, pytest.param(recheck, marks=pytest.mark.slow)])
def test_a_batch_that_does_not_fit_is_named_with_the_option_that_makes_it_smaller(folder, device, work):
    message, cause = in_fresh_process(partial(message_of, work), folder, device)
    assert f"{BATCH_SIZE} samples are scored at a time" in message
    assert "choose a smaller batch_size (of a ClipFilterLoader: score_batch_size), such as 256" in message
    assert cause == ("OutOfMemoryError" if device == "cuda" else "RuntimeError")
    assert ("GiB this process holds" in message) == (device == "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_rewrite_ends_with_that_error(folder, shard, tmp_path, device):
    message, _ = in_fresh_process(partial(message_of, rewrite), folder, device, shard, tmp_path / "out")
    assert _named(message) in (NUM_MEASURED, BATCH_SIZE)  # whichever is the first that does not fit


@pytest.mark.parametrize("device", DEVICES)
def test_a_loader_ends_with_that_error_though_a_thread_scores(folder, shard, device):
    message, _ = in_fresh_process(partial(message_of, load), folder, device, shard)
    assert _named(message) in (NUM_MEASURED, SCORE_BATCH_SIZE[device])


def load_in(folder, device, room: int) -> str:
    """What is said where there is so much room for a model."""
    limit_memory(device, room)
    with pytest.raises(ModelError) as caught:
        ClipScorer(folder, device=device, precision=fast_precision(device))
    return str(caught.value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("room", [8 << 20, 64 << 20, 192 << 20])
def test_a_model_that_does_not_fit_is_named(folder, device, room):
    """On a CPU, whatever of loading it is for which memory does not suffice; on a GPU it takes 150 MB and more."""
    message = in_fresh_process(load_in, folder, device, min(room, 64 << 20) if device == "cuda" else room)
    assert message.startswith(f"{str(folder)!r} takes more memory than ")
    assert "choose a smaller model" in message


def _named(message: str) -> int:
    """How many samples it says were scored at a time."""
    return int(re.match(r"(\d+) samples are scored at a time", message)[1])


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'",
    ],
)
def test_so_are_those_that_libraries_of_a_gpu_run_out_for(message):
    with pytest.raises(BatchTooLargeError, match="64 samples"), memory_for(64, torch.device("cpu")):
        raise RuntimeError(message)


def test_other_errors_are_left_as_they_are(folder):
    scorer = ClipScorer(folder, device="cpu")
    with pytest.raises(ValueError, match="doesn't match the model's 224x224"):
        scorer(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.int64))
