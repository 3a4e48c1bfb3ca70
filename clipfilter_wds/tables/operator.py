"""Filters tables as DataFlow's operator ``ImageClipFilter`` does, with this package's scores and speed."""

import logging
from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from rich.console import Console

from clipfilter_wds.console import show_progress
from clipfilter_wds.models.config import DEFAULT_MODEL
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.scores.kind import COSINES, DEFAULT_THRESHOLD
from clipfilter_wds.tables.images import shown_name
from clipfilter_wds.tables.progress import shown
from clipfilter_wds.tables.scoring import Pair, batched, score_pair_fp32, score_pairs
from clipfilter_wds.tables.tally import PairTally
from clipfilter_wds.types import DropReason
from clipfilter_wds.workers.cpus import default_num_workers

if TYPE_CHECKING:
    import pandas as pd

_BATCH_SIZE = 64
_DESCRIPTION = {
    "en": "Keeps the rows whose caption describes the image: CLIP cosine similarity, clipped to [0, 1], of at least "
    "threshold. Reads the columns input_image_key (path or URL) and input_caption_key; an image that can't be read and "
    "a blank caption score 0.0.",
    "zh": "保留描述与图像相符的图文对：CLIP 余弦相似度（截断到 [0, 1]）不低于 threshold。读取 input_image_key"  # noqa: RUF001  # Chinese has marks of its own
    "（路径或 URL）与 input_caption_key 两列；图像无法读取或描述为空时记 0.0 分。",  # noqa: RUF001  # likewise
}

_logger = logging.getLogger(__name__)


class Storage(Protocol):
    """What the operator needs of a storage, DataFlow's or any other."""

    def read(self, output_type: Any = ..., /) -> Any:
        """Read the table; with ``"dataframe"``, as a pandas ``DataFrame``."""

    def write(self, data: Any, /) -> Any:
        """Store the rows that are kept."""


class ImageClipFilter:
    """Keeps the rows of a table whose caption describes the image.

    A row's score is the cosine similarity of CLIP's embeddings of image and caption, clipped to [0, 1]. It is 0.0 where
    the image can't be read or the caption is blank, and compared with the threshold like any other; the number of such
    rows is logged once per reason. Relative paths begin in the working folder.

    Args:
        model_name: Hugging Face hub id of a CLIP model, a local folder, or ``demo-tiny``.
        device: Any torch device; None takes CUDA where it is available.

    Raises:
        ModelError: When the model can't be used.
        ValueError: When this machine has no such device.
    """

    def __init__(self, model_name: str = DEFAULT_MODEL, device: str | None = None) -> None:
        self.logger = _logger
        self.scorer = ClipScorer(model_name, device=device or "auto")
        self.device = str(self.scorer.device)
        self._already_logged: set[DropReason] = set()

    @staticmethod
    def get_desc(lang: str = "zh") -> str:
        """A description of the operator, in Chinese (``zh``) or English (anything else)."""
        return _DESCRIPTION.get(lang, _DESCRIPTION["en"])

    def run(
        self,
        storage: Storage,
        input_image_key: str = "image",
        input_caption_key: str = "caption",
        threshold: float = DEFAULT_THRESHOLD,
    ) -> list[str]:
        """Read a table, keep the rows whose score is at least ``threshold``, and write it with all its columns.

        Args:
            storage: Anything with ``read("dataframe")`` and ``write(dataframe)``.
            input_image_key: Column of the images: paths, or ``http(s)://`` and other fsspec URLs.
            input_caption_key: Column of the captions.
            threshold: The lowest score of a row that is kept.

        Returns:
            ``[input_image_key, input_caption_key]``.

        Raises:
            ValueError: When the table lacks a column, or the threshold lies outside [-1, 1].
        """
        COSINES.check_threshold(threshold)
        dataframe = storage.read("dataframe")
        images = _cells(dataframe, input_image_key, "input_image_key")
        captions = _cells(dataframe, input_caption_key, "input_caption_key")
        keep = self._keep([Pair.of_cells(*cells) for cells in zip(images, captions, strict=True)], threshold)
        storage.write(dataframe.loc[keep].reset_index(drop=True))
        return [input_image_key, input_caption_key]

    def compute_similarity(self, image_path: str | PathLike[str], text: str) -> float:
        """The score of one pair, in [0, 1]; 0.0 when the image can't be read or the text is blank."""
        pair = Pair.of_cells(image_path, text)
        scores = score_pair_fp32(pair, self.scorer, folder=Path())
        reason = scores.reasons[0]
        if reason is not None and reason not in self._already_logged:
            self._already_logged.add(reason)
            name = shown_name(pair.image)
            self.logger.warning("scored 0.0 as %s: image %s (further ones are not logged)", reason, name)
        return float(scores.similarity[0])

    def is_consistent(
        self, image_path: str | PathLike[str], caption: str, threshold: float = DEFAULT_THRESHOLD
    ) -> bool:
        """Whether a pair's score is at least ``threshold``.

        Raises:
            ValueError: When the threshold lies outside [-1, 1].
        """
        COSINES.check_threshold(threshold)
        return self.compute_similarity(image_path, caption) >= threshold

    def _keep(self, pairs: Sequence[Pair], threshold: float) -> np.ndarray:
        keep = np.zeros(len(pairs), dtype=bool)
        tally = PairTally()
        batches = ((batch, batch) for batch in batched(pairs, _BATCH_SIZE))
        num_workers = default_num_workers(self.scorer.device) if len(pairs) > _BATCH_SIZE else 0
        recheck = Recheck(self.scorer, threshold)
        with show_progress(Console(stderr=True)) as show:
            for batch, scores in score_pairs(batches, recheck, folder=Path(), num_workers=num_workers):
                kept = scores.keep(threshold)
                keep[tally.counts.seen : tally.counts.seen + len(batch)] = kept
                tally.add(batch, scores, kept)
                show(shown(tally, tally.counts.seen / len(pairs)))
        tally.log(self.logger)
        return keep


def _cells(dataframe: "pd.DataFrame", key: str, parameter: str) -> list[object]:
    columns = list(dataframe.columns)
    if key not in columns:
        if not columns and not len(dataframe):
            return []  # an empty jsonl names no columns
        raise ValueError(f"{parameter} is {key!r}, but the table's columns are {', '.join(map(repr, columns))}")
    cells: list[object] = dataframe.iloc[:, columns.index(key)].to_list()
    return cells


def _register_with_dataflow() -> None:
    """Register the operator with DataFlow's registry and pipelines, where DataFlow is installed."""
    try:
        registry = import_module("dataflow.utils.registry").OPERATOR_REGISTRY
        base = import_module("dataflow.core").OperatorABC
    except Exception as error:  # noqa: BLE001  # the operator must work beside a broken DataFlow
        # Other things are called dataflow too, such as the folder of DataFlow's examples; they have no registry.
        is_absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "dataflow"
        if not is_absent:
            _logger.warning("DataFlow is installed but can't be used, so it does not know ImageClipFilter: %s", error)
        return
    registry.register(ImageClipFilter)
    base.register(ImageClipFilter)


_register_with_dataflow()
