"""Slots are page-locked for a GPU; what comes in them is the same with and without."""

import gc
import logging

import pytest
import torch

from clipfilter_wds.workers import page_lock
from clipfilter_wds.workers.slots import Slots
from tests.support.gpu import DEVICES, needs_gpu


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_is_copied_to_the_device_as_it_was_filled_also_after_it_has_grown(device):
    slots = Slots(1, page_locked=device == "cuda")
    worker = slots.of_worker(0)
    for size in (1 << 16, 1 << 16, 1 << 22, 1 << 10):
        numbers = torch.arange(size, dtype=torch.int64).to(torch.uint8)
        worker.buffer(size).copy_(numbers)
        slot = worker.send()
        memory = slots.memory(slot)
        assert memory.is_pinned() == (device == "cuda")
        there = memory[:size].to(device, non_blocking=True)
        assert torch.equal(there.cpu(), numbers)
        del memory
        slots.release(slot)


@needs_gpu
@pytest.mark.gpu
def test_memory_is_let_go_of_with_its_slot():
    """Memory that stayed page-locked could not be page-locked again."""
    memory = torch.empty(1 << 20, dtype=torch.uint8)
    address = memory.data_ptr()
    whole = memory[:]
    page_lock.page_lock(whole)
    assert memory.is_pinned()
    del whole
    gc.collect()
    assert not memory.is_pinned()
    page_lock.page_lock(memory)
    assert memory.is_pinned()
    assert memory.data_ptr() == address


@needs_gpu
@pytest.mark.gpu
def test_a_refusal_is_said_once_and_leaves_cuda_as_it_was(caplog):
    memory = torch.empty(1 << 20, dtype=torch.uint8)
    page_lock._warn.cache_clear()
    page_lock.page_lock(memory)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            page_lock.page_lock(memory)  # it is already
    assert len([record for record in caplog.records if "can't be page-locked" in record.message]) == 1
    assert torch.equal(torch.ones(3, device="cuda").cpu(), torch.ones(3))
