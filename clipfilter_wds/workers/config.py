"""Checks the options of everything that decodes in worker processes. Imports nothing heavy."""

from dataclasses import dataclass, fields

from clipfilter_wds.options import check_number, check_whole_number, plain

#: Seconds that a worker may spend on one sample.
DEFAULT_WORKER_TIMEOUT = 120.0


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How samples are decoded and batched.

    Attributes:
        batch_size: Samples per forward pass; by default as many as suit the model on its device, 64 on a CPU and for
            tables; in a run that is resumed, as many as before.
        num_workers: Processes that decode; by default as many as suit the device. With 0, the main process decodes, and
            ends where an image crashes its decoder.
        worker_timeout: Seconds that one sample may take to decode; 0 for no limit. A sample that takes longer, or kills
            the process that decodes it, is tried once more and then dropped as ``decoder_crash``.

    Raises:
        ValueError: When an option can't be used.
        TypeError: When one that counts is no whole number, or one is no number.
    """

    batch_size: int | None = None
    num_workers: int | None = None
    worker_timeout: float = DEFAULT_WORKER_TIMEOUT

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        if self.batch_size is not None:
            check_whole_number("batch_size", self.batch_size, 1)
        if self.num_workers is not None:
            check_whole_number("num_workers", self.num_workers, 0)
        check_number("worker_timeout", self.worker_timeout)
        if not 0.0 <= self.worker_timeout < float("inf"):
            raise ValueError(f"worker_timeout is {self.worker_timeout:g}; it is a number of seconds, or 0 for no limit")
