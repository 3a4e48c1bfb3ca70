import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from clipfilter_wds.models.fast import add_norm as module
from clipfilter_wds.models.fast.add_norm import add_norm
from tests.support.gpu import needs_gpu

#: Runs the kernel without a GPU, in Triton's interpreter, and compares it with the steps one by one.
INTERPRETED = """
import torch
from torch import nn

from clipfilter_wds.models.fast.add_norm import _launch, add_norm
from clipfilter_wds.models.fast.add_norm_kernel import add_norm_kernel

for width in (1, 96, 512, 768):
    for dtype in (torch.float16, torch.bfloat16):
        norm = nn.LayerNorm(width, eps=1e-3)
        norm.weight.data.normal_(), norm.bias.data.normal_()
        states, added = torch.randn(2, 3, width) * 3 + 1, torch.randn(2, 3, width).to(dtype)
        with torch.inference_mode():
            total, normed = add_norm(states, added, norm, dtype)
            found = _launch(add_norm_kernel, states, added, norm, dtype)
            assert torch.equal(states, total)
            assert (found.dtype, found.shape) == (dtype, normed.shape)
            torch.testing.assert_close(found, normed)
        print(width, dtype)
"""


def case(device="cpu", dtype=torch.bfloat16, shape=(3, 7, 96)):
    generator = torch.Generator().manual_seed(1)
    norm = nn.LayerNorm(shape[-1])
    norm.weight.data.normal_(generator=generator)
    norm.bias.data.normal_(generator=generator)
    states, added = (torch.randn(shape, generator=generator) for _ in range(2))
    return states.to(device), added.to(device, dtype), norm.to(device)


@torch.inference_mode()
def test_the_sum_stays_in_float32_and_its_norm_is_rounded():
    states, added, norm = case()
    total, normed = add_norm(states, added, norm, torch.bfloat16)
    assert torch.equal(total, states + added)
    assert torch.equal(normed, norm(states + added).bfloat16())


def test_the_kernel_computes_the_same():
    pytest.importorskip("triton", reason="comes with torch for GPUs only")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    told = subprocess.check_output([sys.executable, "-c", INTERPRETED], env=environment, text=True)
    assert len(told.splitlines()) == 8


@pytest.mark.parametrize("width", [512, 768, 1024])
def test_the_kernel_is_compiled_for_an_h100_with_accesses_of_16_bytes(width, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton", reason="comes with torch for GPUs only")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clipfilter_wds.models.fast.add_norm_kernel import add_norm_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = {"states": "*fp32", "added": "*fp16", "weight": "*fp32", "bias": "*fp32", "normed": "*fp16", "eps": "fp32"}
    source = ASTSource(
        fn=add_norm_kernel,
        signature={**names, "width": "constexpr", "block": "constexpr"},
        constexprs={"width": width, "block": 1 << (width - 1).bit_length()},
        attrs={(place,): [["tt.divisibility", 16]] for place in range(5)},  # as of tensors that torch allocates
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "ld.global.v4.b32" in code
    assert "st.global.v4.b32" in code
    assert "ld.global.b32" not in code


def test_where_triton_can_not_be_used_a_warning_says_why(caplog):
    with caplog.at_level(logging.WARNING):
        assert module._kernel_on.__wrapped__(torch.device("cpu")) is None
    [record] = caplog.records
    assert "Triton can't be used" in record.getMessage()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_a_gpu_takes_one_kernel(dtype):
    states, added, norm = case("cuda", dtype, (3, 50, 768))
    assert module._kernel_on(states.device) is not None
    total = states + added
    normed = norm(total).to(dtype)
    found = add_norm(states, added, norm, dtype)
    assert torch.equal(found[0], total)
    torch.testing.assert_close(found[1], normed)
