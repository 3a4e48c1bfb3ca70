"""All that a GPU computes in a graph stays there, and nobody looks at it meanwhile. It takes no GPU to see that."""

import pytest
import torch

from clipfilter_wds.models.encoder import ExactEncoder
from clipfilter_wds.models.graphed_encoder import GraphedEncoder
from clipfilter_wds.models.loading import load_model
from tests.support.dual_encoders import FAMILIES
from tests.support.fake_gpu import GPU, FakeGpuGraphs, on_fake_gpu
from tests.support.toys import make_clip


@pytest.fixture(scope="module", params=["clip", *FAMILIES])
def name(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    if request.param == "clip":
        return str(make_clip(folder, image_size=64, patch_size=16, width=256))
    if request.param.startswith("open_clip"):
        pytest.importorskip("open_clip")
    make, _, prefix = FAMILIES[request.param]
    return prefix + str(make(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_towers_in_low_precision_can_be_captured(name, dtype, monkeypatch):
    graphs = FakeGpuGraphs()
    encoder = GraphedEncoder(load_model(name, None), flip=True, dtype=dtype, graphs=graphs).eval()
    with on_fake_gpu(monkeypatch, encoder):
        encoder.warm_up(16)
    assert graphs.num_captures >= 4


def test_the_towers_in_float32_can_be_captured(name, monkeypatch):
    graphs = FakeGpuGraphs()
    encoder = ExactEncoder(load_model(name, None), GPU, flip=False, graphs=graphs).eval()
    with on_fake_gpu(monkeypatch, encoder):
        encoder.warm_up()
    assert graphs.num_captures >= 2


@pytest.mark.parametrize("look", [lambda rows: rows + torch.ones(1), lambda rows: rows * float(rows.sum())])
def test_what_touches_the_host_is_noticed(look, monkeypatch):
    module = torch.nn.Linear(2, 2)
    with on_fake_gpu(monkeypatch, module), pytest.raises((AssertionError, RuntimeError)):
        FakeGpuGraphs().capture(lambda: look(module.weight))
