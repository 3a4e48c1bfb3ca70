"""Computes NormSim: how similar an image is to those of a target set."""

from collections.abc import Iterable

import numpy as np
import torch

from clipfilter_wds.scores.rescore.blocks import as_tensor, block_shape, row_blocks


class NormSim2:
    """NormSim with p = 2 (Wang et al., 2024, arXiv 2405.19547): ``sqrt(sum_t (f . t)^2)`` over the target images t.

    That is the root of ``f^T S f`` with ``S = sum_t t t^T``, so neither time nor memory grows with the target set.
    Computed in float64.

    Args:
        targets: Unit embeddings of the target images, in pieces: float16 or float32 ``[T, D]`` each.
        device: Computes.
    """

    def __init__(self, targets: Iterable[np.ndarray], device: torch.device) -> None:
        self._device = device
        self._num_rows, _ = block_shape(device)
        self._products = sum(
            block.T @ block
            for piece in targets
            for rows in row_blocks(len(piece), self._num_rows)
            for block in [as_tensor(piece[rows], device).double()]
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The scores of images, float32 ``[N]``, given their unit embeddings, float16 or float32 ``[N, D]``."""
        scores = np.empty(len(images), dtype=np.float32)
        for rows in row_blocks(len(images), self._num_rows):
            block = as_tensor(images[rows], self._device).double()
            squares = ((block @ self._products) * block).sum(1)
            scores[rows] = squares.clamp(min=0.0).sqrt().cpu().numpy()
        return scores


class NormSimInf:
    """NormSim with p = infinity (Wang et al., 2024, arXiv 2405.19547): ``max_t |f . t|`` over the target images t.

    Args:
        targets: Unit embeddings of the target images, in pieces: float16 or float32 ``[T, D]`` each. All are held.
        device: Computes, and holds the targets.
    """

    def __init__(self, targets: Iterable[np.ndarray], device: torch.device) -> None:
        self._device = device
        self._num_rows, self._num_columns = block_shape(device)
        self._targets = torch.cat([as_tensor(piece, device) for piece in targets])
        self._products = torch.empty(self._num_rows * self._num_columns, dtype=torch.float32, device=device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The scores of images, float32 ``[N]``, given their unit embeddings, float16 or float32 ``[N, D]``."""
        scores = np.empty(len(images), dtype=np.float32)
        for rows in row_blocks(len(images), self._num_rows):
            block = as_tensor(images[rows], self._device).float()
            largest = torch.zeros(len(block), dtype=torch.float32, device=self._device)
            for columns in row_blocks(len(self._targets), self._num_columns):
                targets = self._targets[columns].float()
                products = self._products[: len(block) * len(targets)].view(len(block), len(targets))
                torch.mm(block, targets.T, out=products)
                largest = torch.maximum(largest, products.abs_().amax(1))
            scores[rows] = largest.cpu().numpy()
        return scores
