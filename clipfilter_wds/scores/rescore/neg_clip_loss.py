"""Computes negCLIPLoss: a pair's similarity, less what its image and caption have with anything."""

import numpy as np
import torch
from torch import Tensor

from clipfilter_wds.scores.rescore.blocks import as_tensor, block_shape, row_blocks
from clipfilter_wds.scores.rescore.row_sample import NOT_SAMPLED


class NegClipLoss:
    """negCLIPLoss (Wang et al., 2024, arXiv 2405.19547): tau times minus a pair's symmetric CLIP loss, in batches.

    With unit image and text embeddings ``f``, ``g`` and ``s_ij = f_i . g_j``, that of a pair i is::

        s_ii - 1/K sum_k tau/2 [log sum_{j in B_k + i} exp(s_ij / tau) + log sum_{j in B_k + i} exp(s_ji / tau)]

    A caption that describes anything ("a picture") is near to many images, so its pairs score low, however high their
    cosine is. The batches ``B_k`` are the same for all pairs. No score is above 0.

    Args:
        images: Unit embeddings of the batches' pairs, one batch behind the other: float16 or float32 ``[K * B, D]``.
            A pair that has none, but zeros, is in no batch.
        texts: Those of their captions, likewise.
        num_batches: K.
        temperature: tau, above 0.
        device: Computes; holds ``images`` and ``texts`` as they are.
    """

    def __init__(
        self, images: np.ndarray, texts: np.ndarray, *, num_batches: int, temperature: float, device: torch.device
    ) -> None:
        self._temperature, self._device = temperature, device
        self._images, self._texts = as_tensor(images, device), as_tensor(texts, device)
        is_empty = ~(self._images.any(1) & self._texts.any(1))
        self._is_empty = is_empty if is_empty.any() else None
        assert len(images) % num_batches == 0
        self._num_batches, self._batch_size = num_batches, len(images) // num_batches
        self._num_rows, self._num_columns = block_shape(device)
        #: What every block is computed in: pages that are new to the process would cost more than the products.
        self._logits = torch.empty(self._num_rows * self._num_columns, dtype=torch.float32, device=device)
        self._column = torch.empty(self._num_columns, images.shape[1], dtype=torch.float32, device=device)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, texts: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The scores of a shard's pairs, float32 ``[N]``. They depend on the rows that are given together, bit for bit.

        Args:
            images: Unit embeddings of the images: float16 or float32 ``[N, D]``.
            texts: Of the captions, likewise.
            places: Per pair, its place in the batches, or ``NOT_SAMPLED``: int64 ``[N]``.
        """
        scores = np.empty(len(images), dtype=np.float32)
        for rows in row_blocks(len(images), self._num_rows):
            image_block, text_block, place_block = (
                as_tensor(each[rows], self._device) for each in (images, texts, places)
            )
            scores[rows] = self._score(image_block.float(), text_block.float(), place_block).cpu().numpy()
        return scores

    def _score(self, images: Tensor, texts: Tensor, places: Tensor) -> Tensor:
        own = (images * texts).sum(1)
        loss = torch.zeros(len(own), dtype=torch.float64, device=self._device)
        for number in range(self._num_batches):
            start = number * self._batch_size
            loss += self._log_sum_exp(images, self._texts, start, own, places)
            loss += self._log_sum_exp(texts, self._images, start, own, places)
        scores = own.double() - self._temperature / (2 * self._num_batches) * loss
        return scores.clamp(max=0.0).float()  # it is, but for rounding

    def _log_sum_exp(self, rows: Tensor, others: Tensor, start: int, own: Tensor, places: Tensor) -> Tensor:
        """``log sum_j exp(s_ij / tau)`` over the batch that begins at ``start``, less the row itself, and ``own``."""
        scaled, total = rows / self._temperature, own / self._temperature
        for first in range(start, start + self._batch_size, self._num_columns):
            size = min(self._num_columns, start + self._batch_size - first)
            column = self._column[:size].copy_(others[first : first + size])
            logits = self._logits[: len(rows) * size].view(len(rows), size)
            torch.mm(scaled, column.T, out=logits)
            if self._is_empty is not None:
                logits.masked_fill_(self._is_empty[first : first + size], -torch.inf)
            is_here = (places != NOT_SAMPLED) & (places >= first) & (places < first + size)
            logits[is_here, places[is_here] - first] = -torch.inf
            highest = torch.maximum(total, logits.amax(1))
            sums = logits.sub_(highest[:, None]).exp_().sum(1)  # in place; torch.logsumexp takes as much memory again
            total = highest + (sums + (total - highest).exp()).log()
        return total
