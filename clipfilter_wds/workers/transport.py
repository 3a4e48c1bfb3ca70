"""Sends what workers make to their parent: tensors in slots of shared memory, all else as bytes through a pipe."""

import io
import pickle
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from clipfilter_wds.workers.slots import Slots, WorkerSlots

T = TypeVar("T")

#: Tensors up to this size travel with the bytes.
_MAX_PIPED_BYTES = 1 << 10


class Message(NamedTuple):
    """What goes through the pipe.

    Attributes:
        worker: Who made it.
        number: Of this worker's messages, counting from 1, so that a lost one is missed.
        slot: Where the item's tensors are, None for nowhere.
        data: The item, pickled, without these.
    """

    worker: int
    number: int
    slot: int | None
    data: bytes


@runtime_checkable
class NamesSamples(Protocol):
    """An item that can tell which of its samples can't be sent."""

    def unpicklable_sample(self) -> str | None:
        """What to call the first sample that can't be pickled; None when there is none."""


# --- in a worker ---

#: The slots of the process that this is, where it is a worker.
_slots: WorkerSlots | None = None


def slot_buffer(num_bytes: int) -> torch.Tensor:
    """Memory for the views of a batch, uint8 ``[num_bytes]``, that goes to the parent without a copy.

    In a worker it is a slot's, which is waited for, and is the same until the batch is sent; elsewhere it is ordinary.
    """
    return torch.empty(num_bytes, dtype=torch.uint8) if _slots is None else _slots.buffer(num_bytes)


class _Sender:
    """Turns items into messages.

    It pickles here and not in multiprocessing's thread, where an item that can't be pickled would vanish.
    """

    def __init__(self) -> None:
        self._slots: Slots | None = None

    def open_slots(self, num_workers: int, *, page_locked: bool) -> Slots:
        """New slots, for workers that are about to be started."""
        self._slots = Slots(num_workers, page_locked=page_locked)
        return self._slots

    def begin(self) -> None:
        """Have :func:`slot_buffer` give slots in this worker."""
        global _slots  # one worker, one process
        if _slots is None:
            assert self._slots is not None, "slots are opened before workers are started"
            _slots = self._slots.of_worker(_worker_id())

    def send(self, item: Any) -> Message:
        """The message that an item becomes."""
        assert _slots is not None, "a worker begins before it sends"
        assert self._slots is not None, "a worker begins before it sends"
        worker, file = _worker_id(), io.BytesIO()
        try:
            _Pickler(file, _slots).dump(item)
        except Exception as error:
            if isinstance(item, NamesSamples) and (name := item.unpicklable_sample()) is not None:
                error.add_note(f"{name} has a view that can't be sent from a worker; what transforms return is pickled")
            raise
        self._slots.num_made[worker] += 1
        return Message(worker, self._slots.num_made[worker], _slots.send(), file.getvalue())


def _worker_id() -> int:
    info = get_worker_info()
    assert info is not None, "only workers send"
    return info.id


class SendingStream(_Sender, IterableDataset[Message]):
    """A dataset's items as messages."""

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        super().__init__()
        self._dataset = dataset

    def __iter__(self) -> Iterator[Message]:
        self.begin()
        for item in self._dataset:
            yield self.send(item)


class SendingItems(_Sender, Dataset[Message]):
    """What a dataset makes of requests, as messages."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        super().__init__()
        self._dataset = dataset

    def __len__(self) -> int:
        length: int = len(self._dataset)  # type: ignore[arg-type]
        return length

    def __getitem__(self, request: Any) -> Message:
        self.begin()
        return self.send(self._dataset[request])


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, slots: WorkerSlots) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._slots = slots

    def persistent_id(self, obj: Any) -> Any:
        """Where a tensor is, instead of the tensor; None for what is pickled as ever."""
        if type(obj) is not torch.Tensor or not _is_plain(obj):
            return None
        if obj.nbytes <= _MAX_PIPED_BYTES:
            dense = obj.clone(memory_format=torch.contiguous_format)
            return bytearray(dense.view(-1).view(torch.uint8).numpy()), obj.dtype, obj.shape, dense.stride()
        begin, strides = self._slots.place(obj)
        return begin, obj.dtype, obj.shape, strides


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is nothing but its bytes, type and shape."""
    is_odd = tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.layout is torch.strided and not is_odd


# --- in the parent ---


class Lent(Generic[T]):
    """An item whose tensors may lie in a worker's slot. It is the worker's again after :meth:`release`.

    Args:
        item: What a worker made.
    """

    def __init__(self, item: T) -> None:
        self.item = item

    @property
    def is_shared(self) -> bool:
        """Whether there is such memory."""
        return False

    def release(self) -> None:
        """Give the memory back. The item's tensors must not be used any more."""


def lent(item: T | Lent[T]) -> Lent[T]:
    """What a loader gives, as if it were lent in any case."""
    return item if isinstance(item, Lent) else Lent(item)


class Delivery(Lent[T]):
    """A message that has come. What nobody takes is given back when it is let go of."""

    def __init__(self, message: Message, slots: Slots) -> None:
        self._message, self._slots, self._slot = message, slots, message.slot

    @cached_property
    def item(self) -> T:  # type: ignore[override]
        """What the worker made."""
        return self._load(copy=False)

    @property
    def is_shared(self) -> bool:
        """Whether the worker waits for it."""
        return self._slot is not None

    def take(self) -> T:
        """What the worker made, in memory of its own."""
        item = self._load(copy=True)
        self.release()
        return item

    def _load(self, *, copy: bool) -> T:
        memory = None if self._slot is None else self._slots.memory(self._slot)
        item: T = _Unpickler(self._message.data, memory, copy=copy).load()
        return item

    def release(self) -> None:
        """Give the memory back."""
        if self._slot is not None:
            self._slots.release(self._slot)
            self._slot = None

    def __del__(self) -> None:
        self.release()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, memory: torch.Tensor | None, *, copy: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._memory, self._copy = memory, copy

    def persistent_load(self, place: Any) -> torch.Tensor:
        """The tensor that lies there."""
        where, dtype, shape, strides = place
        if isinstance(where, bytearray):
            data = torch.frombuffer(where, dtype=torch.uint8) if where else torch.empty(0, dtype=torch.uint8)
            return data.view(dtype).as_strided(shape, strides)
        assert self._memory is not None, "a message with a tensor has a slot"
        storage, start = self._memory.untyped_storage(), where // dtype.itemsize
        tensor = torch.empty(0, dtype=dtype).set_(storage, start, shape, strides)
        return tensor.clone() if self._copy else tensor
