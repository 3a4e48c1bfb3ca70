import multiprocessing
import operator

import pytest
import torch
from torch import nn

from clipfilter_wds.models.fast.float32 import (
    ReducedFloat32Error,
    check_float32_products,
    float32_products,
    keep_convolutions,
)
from clipfilter_wds.models.scorer import ClipScorer
from tests.support.toys import make_clip

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def setting():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_on_a_gpu_in_tf32_are_refused_with_the_cure(precision):
    check_float32_products(CUDA)
    torch.set_float32_matmul_precision(precision)
    with pytest.raises(ReducedFloat32Error, match=r"set_float32_matmul_precision\('highest'\).*cuda_graphs"):
        check_float32_products(CUDA)
    with float32_products(CUDA):
        check_float32_products(CUDA)
    assert torch.get_float32_matmul_precision() == precision


def test_the_setting_is_given_back_after_an_error():
    torch.backends.cuda.matmul.allow_tf32 = True
    with pytest.raises(KeyError), float32_products(CUDA):
        raise KeyError
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has no settings per backend")
def test_what_was_told_of_gpus_only_is_not_told_of_cpus():
    torch.backends.cuda.matmul.allow_tf32 = True
    before = torch.backends.mkldnn.matmul.fp32_precision
    with float32_products(CUDA):
        check_float32_products(CUDA)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_on_a_cpu_are_float32_whatever_torch_was_told(precision):
    rows = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    expected = rows @ rows.T
    torch.set_float32_matmul_precision(precision)
    with float32_products(CPU):
        assert torch.equal(rows @ rows.T, expected)
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has no settings per backend")
@pytest.mark.parametrize("name", ["torch.backends", "torch.backends.cuda.matmul"])
def test_the_settings_of_newer_torch_are_known_too(name):
    # In a process of its own, since these settings can't be mixed with the older ones afterwards.
    process = multiprocessing.get_context("fork").Process(target=check_newer_setting, args=(name,))
    process.start()
    process.join()
    assert process.exitcode == 0


def check_newer_setting(name: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"  # as at the start: what torch.backends says
    backend = operator.attrgetter(name.removeprefix("torch."))(torch)
    backend.fp32_precision = "ieee"
    check_float32_products(CUDA)
    backend.fp32_precision = "tf32"
    with pytest.raises(ReducedFloat32Error, match=r"torch.backends.cuda.matmul.fp32_precision = 'ieee'"):
        check_float32_products(CUDA)
    with float32_products(CUDA):
        check_float32_products(CUDA)
    assert backend.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("width", [32, 256])
def test_float32_on_a_cpu_stays_float32_or_is_refused(precision, width, tmp_path):
    scorer = ClipScorer(make_clip(tmp_path, width=width), device="cpu", precision="fp32")
    pixel_values = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    input_ids = scorer.preprocess.tokenize([f"photo {number}" for number in range(8)]).input_ids
    expected = scorer(pixel_values, input_ids)
    torch.set_float32_matmul_precision(precision)
    try:
        scores = scorer(pixel_values, input_ids)
    except ReducedFloat32Error:
        numbers = torch.full((512, 512), 1 + 2.0**-20)
        assert not torch.equal(numbers @ torch.eye(512), numbers)
    else:
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("option", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 3}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_give_the_same_without_the_setting(option, bias):
    convolution = nn.Conv2d(3, 6, 3, bias=bias, **option)
    layers = nn.Sequential(convolution)
    keep_convolutions(layers)
    assert not isinstance(layers[0], nn.Conv2d)
    pixels = torch.randn(2, 3, 12, 12)
    with torch.inference_mode():
        torch.testing.assert_close(layers(pixels), convolution(pixels))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("option", [{"padding": 1}, {"stride": 2}], ids=str)
def test_convolutions_on_a_gpu_are_float32_whatever_torch_was_told(option):
    convolution = nn.Conv2d(64, 64, 3, **option)
    layers, pixels = nn.Sequential(convolution), torch.randn(4, 64, 32, 32)
    keep_convolutions(layers)
    expected = convolution.double()(pixels.double()).float()
    found = layers.float().cuda()(pixels.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
