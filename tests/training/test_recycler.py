import gc

import pytest
import torch

from clipfilter_wds.training.recycler import Recycler

SHAPE = (64, 3, 32, 32)


def test_memory_is_used_again_when_no_tensor_has_it_any_more():
    new = Recycler()
    tensor = new(SHAPE, torch.uint8)
    address = tensor.data_ptr()
    del tensor
    assert new(SHAPE, torch.uint8).data_ptr() == address


@pytest.mark.parametrize(
    "part",
    [
        lambda tensor: tensor[3:5, 1],
        lambda tensor: tensor.view(torch.int32),
        lambda tensor: tensor.permute(0, 2, 3, 1),
        lambda tensor: tensor.numpy()[2],
        lambda tensor: tensor.detach().flatten(),
        lambda tensor: [tensor.untyped_storage()],
    ],
)
def test_memory_of_which_a_part_is_in_use_is_nobody_elses(part):
    new = Recycler()
    tensor = new(SHAPE, torch.uint8).fill_(1)
    address, kept = tensor.data_ptr(), part(tensor)
    del tensor
    gc.collect()
    others = [new(SHAPE, torch.uint8).fill_(2) for _ in range(10)]
    assert address not in {other.data_ptr() for other in others}
    del kept, others
    gc.collect()
    assert address in {each.data_ptr() for each in [new(SHAPE, torch.uint8) for _ in range(10)]}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (1,), (5, 7), SHAPE])
def test_any_shape_and_type_can_be_had(shape, dtype):
    tensor = Recycler()(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), dtype, True)


def test_what_is_kept_is_bounded_however_many_tensors_are_in_use():
    new = Recycler()
    tensors = [new(SHAPE, torch.uint8) for _ in range(100)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 100
    assert len(new._kept) < 30


def test_nearly_as_large_tensors_take_each_others_memory_and_other_sizes_are_given_up():
    new = Recycler()
    address = new((50, 3, 32, 32), torch.uint8).data_ptr()
    assert new((52, 3, 32, 32), torch.uint8).data_ptr() == address
    for num_rows in range(100, 1000):
        new((num_rows, 3, 32, 32), torch.uint8)
    assert sum(memory.nbytes for memory in new._kept) < 30 * 1.25 * 1000 * 3 * 32 * 32
    assert len(new._kept) < 30
