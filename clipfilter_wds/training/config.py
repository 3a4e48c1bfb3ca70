"""Checks the options of a training loader. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from clipfilter_wds.options import check_whole_number
from clipfilter_wds.scores.kind import AutoThreshold
from clipfilter_wds.scores.metadata import DTYPES, Embeddings
from clipfilter_wds.workers.config import WorkerConfig

TrainEnd = Literal["sync", "repeat"]
EvalEnd = Literal["each", "pad"]
End = Literal[TrainEnd, EvalEnd]
OnCrash = Literal["skip", "raise"]

#: Options that say how shards are read.
_OF_READING = (
    "num_workers",
    "worker_timeout",
    "score_batch_size",
    "num_streams",
    "on_crash",
    "persistent_workers",
    "multiprocessing_context",
)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig(WorkerConfig):
    """How a :class:`ClipFilterLoader` works.

    Attributes:
        threshold: Keep a pair when its cosine similarity, clipped to [0, 1], is at least this; ``auto`` is 0.25. None
            keeps all pairs and only adds their scores. Scores of another kind, from a score folder, are compared as
            they are, and need a number.
        batch_size: Pairs per training batch and rank.
        score_batch_size: Samples per forward pass of the scorer; by default as many as suit the model on its device, 64
            on a CPU.
        num_workers: Processes that read and decode, per rank. With 0, the training process decodes.
        drop_last: Leave out an epoch's last batch when it is smaller than the others.
        end: How an epoch ends on several ranks. For training, ``sync``: on all together, when the first has no further
            batch; or ``repeat``: after ``batches_per_epoch`` batches, since the stream of shards is endless. For
            evaluation, where each sample has to come once, ``each``: each rank ends by itself; or ``pad``: all ranks
            get as many batches, all of ``batch_size``, and a bool column ``is_padding`` marks repeated rows.
        batches_per_epoch: For ``repeat``.
        num_streams: Streams that an epoch is split into, which ranks and workers share out; a run can be resumed on up
            to as many ranks, and uses as many workers. By default as many as there are workers in all ranks.
        record: Folder to record the scores of shards in. What it holds is not scored again, not even in later epochs,
            and samples that were dropped are not decoded again.
        record_embeddings: Save the embeddings beside them, as ``fp16`` or ``fp32``, as ``score --embeddings`` does.
            What was recorded without is scored again.
        score_columns: Columns of the tables of a ``ScoreFolder`` that batches hold too: numbers as float32, NaN where
            one is missing; texts as a list.
        starvation_limit: Raise an error after this many samples in a row of which none is kept.
        on_crash: What happens to a sample that kills its worker, or takes longer than ``worker_timeout``. ``skip``: it
            is tried once more and then dropped as ``decoder_crash``. ``raise``: a ``WorkerDiedError`` names it.
        persistent_workers: Keep the workers from one epoch to the next (``end="sync"``).
        multiprocessing_context: ``fork``, ``spawn`` or ``forkserver``; None is Python's default.

    Raises:
        ValueError: When an option can't be used.
        TypeError: When one that counts is no whole number, one that is True or False neither, or ``score_columns`` one
            text.
    """

    threshold: float | AutoThreshold | None = "auto"
    batch_size: int = 256
    score_batch_size: int | None = None
    num_workers: int = 0
    drop_last: bool = False
    end: End = "sync"
    batches_per_epoch: int | None = None
    num_streams: int | None = None
    record: str | Path | None = None
    record_embeddings: Embeddings | None = None
    score_columns: Sequence[str] = ()
    starvation_limit: int = 100_000
    on_crash: OnCrash = "skip"
    persistent_workers: bool = False
    multiprocessing_context: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_number("batch_size", self.batch_size, 1)  # here neither is left to what suits
        check_whole_number("num_workers", self.num_workers, 0)
        for name in ("score_batch_size", "num_streams", "batches_per_epoch"):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), 1)
        check_whole_number("starvation_limit", self.starvation_limit, 1)
        for name in ("drop_last", "persistent_workers"):
            if not isinstance(getattr(self, name), bool):  # a text such as "no" would count as True
                raise TypeError(f"{name} is {getattr(self, name)!r}; use True or False")
        if isinstance(self.score_columns, str):
            raise TypeError(f"score_columns is {self.score_columns!r}; give a list, such as [{self.score_columns!r}]")
        if self.record is not None and not str(self.record):
            raise ValueError("record is an empty text; give the folder to record in")
        if self.on_crash not in ("skip", "raise"):
            raise ValueError(f"on_crash is {self.on_crash!r}; use 'skip' or 'raise'")
        if self.record_embeddings is not None and self.record_embeddings not in DTYPES:
            raise ValueError(f"record_embeddings is {self.record_embeddings!r}; use {' or '.join(DTYPES)}")
        if self.record_embeddings is not None and self.record is None:
            raise ValueError("record_embeddings go beside recorded scores; give the folder to record in, as record")
        if self.end not in get_args(End):
            raise ValueError(f"end is {self.end!r}; use 'sync' or 'repeat' to train, 'each' or 'pad' to evaluate")
        if self.drop_last and self.is_evaluation:
            raise ValueError(f"end is {self.end!r}, which gives every sample; it does not go with drop_last")
        if self.persistent_workers and (self.num_workers == 0 or self.end != "sync"):
            raise ValueError("persistent_workers needs num_workers of at least 1, and end='sync'")
        if self.end == "repeat" and self.batches_per_epoch is None:
            raise ValueError("end is 'repeat', which never ends; batches_per_epoch says how many batches an epoch has")
        if self.end != "repeat" and self.batches_per_epoch is not None:
            raise ValueError(f"batches_per_epoch is for end 'repeat', and end is {self.end!r}")

    @property
    def resolved_threshold(self) -> float | None:
        """The threshold of a loader, which has replaced ``auto`` by what suits its scores."""
        assert not isinstance(self.threshold, str)
        return self.threshold

    @property
    def is_evaluation(self) -> bool:
        """Whether each sample comes once, whatever that means for the number of batches of each rank."""
        return self.end in get_args(EvalEnd)

    def check_suits_other_loaders(self) -> None:
        """Refuse options that mean nothing where another loader reads.

        Raises:
            ValueError: Naming them.
        """
        if self.end == "repeat":
            raise ValueError(
                "end is 'repeat', which reads the shards of a ClipWebDataset without end; around another loader, "
                "'sync' ends an epoch for all ranks when the first has no further batch"
            )
        set_ = [option.name for option in fields(self) if getattr(self, option.name) != option.default]
        if idle := [f"{name}={getattr(self, name)!r}" for name in set_ if name in _OF_READING]:
            raise ValueError(
                f"{', '.join(idle)}: this is for a ClipWebDataset, which is read here; what is given reads and makes "
                "its batches by itself, so set it there"
            )
