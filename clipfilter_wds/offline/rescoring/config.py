"""Checks the options of ``rescore`` and ``dedup``. Imports neither torch nor pyarrow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from clipfilter_wds.scores.apart import check_apart
from clipfilter_wds.scores.fraction import check_fraction
from clipfilter_wds.storage.paths import AnyPath, any_path
from clipfilter_wds.storage.publish import check_writable

MethodName = Literal["neg_clip_loss", "norm_sim_2", "norm_sim_inf", "sum", "product", "min_rank", "then"]

#: Methods whose scores are made of several folders' scores.
_COMBINATIONS = ("sum", "product", "min_rank", "then")
#: Options that belong to one method.
_METHOD_OF = {"temperature": "neg_clip_loss", "target": "norm_sim", "weights": "sum", "fractions": "then"}


@dataclass(frozen=True, kw_only=True)
class RescoringConfig:
    """Output of a run that makes score tables from score tables.

    Attributes:
        output: Folder to write score tables to, one for each of the input's. A run that was stopped resumes when it is
            started again.
        embeddings: Folder of the run that saved the embeddings (``score --embeddings``), where SCORES were derived from
            its tables and have none. It must have embedded what was scored.
        device: ``cpu``, ``cuda``, or ``cuda:1``; by default CUDA where there is one.

    Raises:
        ValueError: When an option can't be used.
    """

    output: str | Path
    embeddings: str | Path | None = None
    device: str = "auto"

    @property
    def folder(self) -> AnyPath:
        """The output folder."""
        return any_path(self.output)

    def _check_output(self, sources: Sequence[str | Path]) -> None:
        for source in [*sources, *([] if self.embeddings is None else [self.embeddings])]:
            check_apart(self.folder, source)
        check_writable(self.folder)


@dataclass(frozen=True, kw_only=True)
class RescoreConfig(RescoringConfig):
    """Input and method of ``rescore``.

    Such a run writes score tables of another kind; no model is loaded and no shard read. Creating a config checks all
    that can be checked without the tables.

    Attributes:
        scores: Folder of score tables; for a combination (``sum``, ``product``, ``min_rank``, ``then``) several,
            separated by commas or as a list, of the same shards. A folder that is there is one, whatever commas its
            name has.
        method: ``neg_clip_loss``: the cosine less what image and caption have with anything. ``norm_sim_2``,
            ``norm_sim_inf``: how similar the image is to those of ``target``. ``sum``, ``product``, ``min_rank`` of the
            folders' scores. ``then``: the best by the first folder, of these the best by the next.
        temperature: Of ``neg_clip_loss``; by default the checkpoint's own, as the tables have it.
        num_batches: Of ``neg_clip_loss``: how many batches each pair is compared with.
        batch_size: Of ``neg_clip_loss``: pairs in a batch. With fewer than ``num_batches`` times as many pairs, all are
            one batch.
        seed: Of ``neg_clip_loss``: chooses the pairs in the batches.
        target: Of ``norm_sim``: folder of a run with embeddings of the target images, by the same model and with the
            same settings for images.
        weights: Of ``sum``: a number per folder, separated by commas; by default 1 each.
        fractions: Of ``then``: a fraction per folder, separated by commas, each of all pairs: ``0.3,0.2`` keeps the
            best 30 % by the first, and of these 20 % of all by the second.

    Raises:
        ValueError: When an option can't be used.
    """

    scores: str | Path | Sequence[str | Path]
    method: MethodName
    temperature: float | None = None
    num_batches: int = 10
    batch_size: int = 32_768
    seed: int = 0
    target: str | Path | None = None
    weights: float | str | Sequence[float | str] | None = None
    fractions: float | str | Sequence[float | str] | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(MethodName):
            raise ValueError(f"method is {self.method!r}; use one of {', '.join(get_args(MethodName))}")
        for name, method in _METHOD_OF.items():
            if getattr(self, name) is not None and not self.method.startswith(method):
                raise ValueError(f"{name} is for method {method}, and the method is {self.method}")
        if self.num_batches < 1 or self.batch_size < 1:
            raise ValueError(
                f"num_batches is {self.num_batches} and batch_size {self.batch_size}; each must be at least 1"
            )
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature:g}; it must be above 0, as 0.01 is")
        if self.method.startswith("norm_sim") and self.target is None:
            raise ValueError(
                f"{self.method} needs a target: the folder of a run with --embeddings of the target images"
            )
        self._check_folders()
        self._check_output([*self.folders, *([] if self.target is None else [self.target])])

    def _check_folders(self) -> None:
        num_folders = len(self.folders)
        if self.method in _COMBINATIONS and num_folders < 2:
            raise ValueError(f"{self.method} combines score folders; give at least two, separated by a comma")
        if self.method not in _COMBINATIONS and num_folders > 1:
            raise ValueError(f"{self.method} takes one score folder, and {num_folders} are given")
        for name, numbers in (("weights", self.folder_weights), ("fractions", self.folder_fractions)):
            if getattr(self, name) is not None and len(numbers) != num_folders:
                raise ValueError(
                    f"{name} are {_listed(numbers)}, and there are {num_folders} score folders; give one for each"
                )
        if not all(map(math.isfinite, self.folder_weights)):
            raise ValueError(f"weights are {_listed(self.folder_weights)}; a sum needs numbers that are finite")
        if self.method == "then":
            if self.fractions is None:
                raise ValueError("then needs fractions, one for each score folder, as 0.3,0.2 is")
            falling = sorted((check_fraction(each, "a fraction") for each in self.folder_fractions), reverse=True)
            if falling != self.folder_fractions:
                raise ValueError(
                    f"fractions are {_listed(self.folder_fractions)}; each is of all pairs, so none can be above the "
                    "one before it"
                )

    @property
    def uses_embeddings(self) -> bool:
        """Whether embeddings make the scores, and not other scores."""
        return self.method not in _COMBINATIONS

    @cached_property
    def folders(self) -> list[str]:
        """The score folders."""
        given = [self.scores] if isinstance(self.scores, str | Path) else self.scores
        return [folder for each in given for folder in _folders_in(each)]

    @cached_property
    def folder_weights(self) -> list[float]:
        """Per score folder, its weight in a sum."""
        return [1.0] * len(self.folders) if self.weights is None else _numbers("weights", self.weights)

    @cached_property
    def folder_fractions(self) -> list[float]:
        """Per score folder, the fraction of all that it leaves."""
        return [] if self.fractions is None else _numbers("fractions", self.fractions)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the scores, beside the tables."""
        settings: dict[str, Any] = {"method": self.method}
        if self.method == "neg_clip_loss":
            settings |= {"num_batches": self.num_batches, "batch_size": self.batch_size, "seed": self.seed}
        if self.method == "sum":
            settings |= {"weights": self.folder_weights}
        if self.method == "then":
            settings |= {"fractions": self.folder_fractions}
        return settings


@dataclass(frozen=True, kw_only=True)
class DedupConfig(RescoringConfig):
    """Input of ``dedup``.

    Such a run writes the score tables anew, where near-duplicates are dropped; no model is loaded and no shard read.

    Attributes:
        scores: Folder of score tables. Of near-duplicates, the one with the highest score is kept.
        similarity: Two images are near-duplicates when the cosine of their embeddings is at least this.
        search: ``exact`` compares with every image that is kept, ``clustered`` with those in the nearest clusters,
            which misses a few and needs ``pip install 'clipfilter-wds[dedup]'``; by default exact up to 200,000 images,
            and 2,000,000 on a GPU.

    Raises:
        ValueError: When an option can't be used.
    """

    scores: str | Path
    similarity: float = 0.95
    search: Literal["auto", "exact", "clustered"] = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity is {self.similarity:g}; a cosine in (0, 1] is meant, such as 0.95")
        self._check_output([self.scores])


def _folders_in(given: str | Path) -> list[str]:
    """The folders of a text with commas between them, which a command line gives; or the one that it is the name of."""
    if isinstance(given, Path) or ("," in given and Path(given).expanduser().is_dir()):
        return [str(given)]
    return [folder for each in given.split(",") if (folder := each.strip())]


def _numbers(name: str, given: float | str | Sequence[float | str]) -> list[float]:
    texts = [given] if isinstance(given, float | int | str) else given
    try:
        return [float(number) for text in texts for number in str(text).split(",")]
    except ValueError:
        raise ValueError(f"{name} is {given!r}; give numbers, separated by commas") from None


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
