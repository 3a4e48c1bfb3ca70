"""Models that several tests share; they are made once."""

from pathlib import Path

import pytest
import torch

from clipfilter_wds.scorer import ClipScorer
from tests.toys import make_clip

# The models here are tiny: a second thread costs more than it brings, above all beside DataLoader workers.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("models") / "clip-32")


@pytest.fixture(scope="session")
def scorer(clip_folder) -> ClipScorer:
    return ClipScorer(clip_folder, device="cpu")
