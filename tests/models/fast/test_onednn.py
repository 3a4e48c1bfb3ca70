import pytest
import torch
from torch.nn import functional

from clipfilter_wds.models.fast.onednn import onednn_linear
from clipfilter_wds.models.precision import NARROW

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_rows", [8, 256, 400])
def test_an_output_does_not_depend_on_where_its_row_is(num_rows):
    generator = torch.Generator().manual_seed(0)
    row, weight = torch.randn(1, NARROW, generator=generator), torch.randn(NARROW, NARROW, generator=generator)
    with torch.inference_mode(), onednn_linear(CPU, NARROW):
        products = functional.linear(row.expand(num_rows, -1).contiguous(), weight)
    assert all(torch.equal(product, products[0]) for product in products)


def test_outputs_are_those_of_torchs_own_linear_layers():
    generator = torch.Generator().manual_seed(0)
    features, weight, bias = (torch.randn(shape, generator=generator) for shape in ((8, 50, 96), (64, 96), (64,)))
    with torch.inference_mode(), onednn_linear(CPU, NARROW):
        with_bias, without = functional.linear(features, weight, bias), functional.linear(features, weight, bias=None)
        with torch.autocast("cpu", torch.bfloat16):  # whatever the weights are in
            low, of_fp32_weights = (functional.linear(features, matrix) for matrix in (weight.bfloat16(), weight))
    torch.testing.assert_close(with_bias, functional.linear(features, weight, bias), atol=1e-5, rtol=0)
    torch.testing.assert_close(without, functional.linear(features, weight), atol=1e-5, rtol=0)
    assert low.dtype == of_fp32_weights.dtype == torch.bfloat16
    assert torch.equal(low, of_fp32_weights)
    torch.testing.assert_close(low, functional.linear(features.bfloat16(), weight.bfloat16()), atol=1e-2, rtol=1e-2)
