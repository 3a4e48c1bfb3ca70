import pytest
import torch

from clipfilter_wds.models.batch_size import default_batch_size
from clipfilter_wds.models.fast.buckets import ROW_COUNTS


@pytest.mark.parametrize("width", [64, 768, 1664])
def test_a_cpu_scores_64_together(width):
    assert default_batch_size(torch.device("cpu"), width) == 64


def test_a_gpu_scores_more_together_the_narrower_the_model():
    sizes = [default_batch_size(torch.device("cuda"), width) for width in (256, 768, 1024, 1280, 1664)]
    assert sizes == [1024, 512, 256, 128, 128]
    assert set(sizes) <= set(ROW_COUNTS)  # nothing is filled up
