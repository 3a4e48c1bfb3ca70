"""Finds near-duplicate images by their embeddings: those that are similar to a better one that is kept."""

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from clipfilter_wds.scores.rescore.blocks import as_tensor, block_shape, exact_cosines, row_blocks, unit_rows
from clipfilter_wds.scores.rescore.clustered_search import ClusteredSearch

Search = Literal["exact", "clustered"]

#: How far a float32 product of unit vectors may be off; what is nearer to the limit is computed in float64.
_MARGIN = 1e-4
_PAIRS_AT_ONCE = 1 << 13
#: Rows that are looked up at a time in clusters.
_CLUSTERED_BLOCK = 2048


class KeptSearch(Protocol):
    """Looks among the kept rows, which are the first ones of the embeddings."""

    def near(self, block: Tensor, kept: Tensor) -> np.ndarray:
        """Whether each row of a block, ``[n, D]``, is near to a kept one, ``[k, D]``: bool ``[n]``."""

    def add(self, block: Tensor) -> None:
        """Take rows as kept, behind the others: ``[m, D]``."""


def near_duplicates(
    embeddings: np.ndarray,
    similarity: float,
    *,
    search: Search,
    device: torch.device,
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> np.ndarray:
    """Which rows are near-duplicates of one before them that is none: bool ``[N]``.

    Greedy, and without chains: a row is one when its similarity to a row that is kept is at least ``similarity``;
    what a dropped row is near to counts for nothing. Decided on cosines in float64, whatever finds the candidates.
    Memory is that of ``embeddings`` (twice in clusters), which are overwritten.

    Args:
        embeddings: The best sample first, of length 1 but for rounding: float16 or float32 ``[N, D]``.
        similarity: From which cosine on two images are near-duplicates.
        search: ``exact`` compares with every kept row; ``clustered`` with those in the nearest clusters of them, which
            misses some, and needs faiss.
        device: Computes the exact search.
        on_progress: Told how many rows are decided.

    Raises:
        ValueError: When faiss is needed and not installed.
    """
    if not len(embeddings):
        return np.zeros(0, dtype=bool)
    rows = torch.from_numpy(embeddings) if device.type == "cpu" else as_tensor(embeddings, device)
    kept_rows: KeptSearch = _ExactSearch(similarity, device)
    size, _ = block_shape(device)
    if search == "clustered":
        kept_rows, size = ClusteredSearch(embeddings, similarity), _CLUSTERED_BLOCK
    dropped, num_kept = np.zeros(len(rows), dtype=bool), 0
    for each in row_blocks(len(rows), size):
        block = rows[each].clone()
        near = kept_rows.near(block, rows[:num_kept])
        left = np.flatnonzero(~near)
        near[left[_near_within(block[left], similarity)]] = True
        dropped[each] = near
        kept = block[np.flatnonzero(~near)]
        rows[num_kept : num_kept + len(kept)] = kept  # over rows that are decided
        num_kept += len(kept)
        kept_rows.add(kept)
        on_progress(each.stop)
    return dropped


class _ExactSearch:
    """Compares with every kept row."""

    def __init__(self, similarity: float, device: torch.device) -> None:
        self._similarity = similarity
        num_rows, self._num_columns = block_shape(device)
        self._products = torch.empty(num_rows * self._num_columns, dtype=torch.float32, device=device)

    def near(self, block: Tensor, kept: Tensor) -> np.ndarray:
        near = torch.zeros(len(block), dtype=torch.bool, device=block.device)
        rows = unit_rows(block)
        for columns in row_blocks(len(kept), self._num_columns):
            others = kept[columns]
            products = self._products[: len(rows) * len(others)].view(len(rows), len(others))
            torch.mm(rows, unit_rows(others).T, out=products)
            highest = products.amax(1)
            near |= highest > self._similarity + _MARGIN
            unsure = (~near & (highest >= self._similarity - _MARGIN)).nonzero()[:, 0]
            near[unsure] = _reach(products[unsure], block[unsure], others, self._similarity).any(1)
        found: np.ndarray = near.cpu().numpy()
        return found

    def add(self, block: Tensor) -> None:
        """They lie where the kept ones are looked for."""


def _near_within(block: Tensor, similarity: float) -> np.ndarray:
    """Which rows of a block, ``[n, D]``, are near to one before them that is kept: bool ``[n]``."""
    rows = unit_rows(block)
    later = torch.ones(len(rows), len(rows), dtype=torch.bool, device=block.device).triu(1)
    products = (rows @ rows.T).masked_fill_(~later, -torch.inf)
    near = _reach(products, block, block, similarity).cpu().numpy()
    dropped = np.zeros(len(near), dtype=bool)
    for row in np.flatnonzero(near.any(1)):
        if not dropped[row]:
            dropped |= near[row]
    return dropped


def _reach(products: Tensor, rows: Tensor, others: Tensor, similarity: float) -> Tensor:
    """Whether rows, ``[n, D]``, reach the similarity with others, ``[m, D]``, given the products: bool ``[n, m]``."""
    reached = products >= similarity
    unsure = ((products - similarity).abs_() <= _MARGIN).nonzero()
    for some in unsure.split(_PAIRS_AT_ONCE):  # of images that are all alike, every pair may be unsure
        row, other = some.unbind(1)
        reached[row, other] = exact_cosines(rows[row], others[other]) >= similarity
    return reached
