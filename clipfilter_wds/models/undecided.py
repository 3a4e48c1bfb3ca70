"""Holds, of a batch with fast scores, the samples that these do not decide, until float32 does."""

from collections.abc import Sequence

import numpy as np
import torch

from clipfilter_wds.models.device import to_device

#: In float32, first the caption is computed again, then the image.
NUM_TOWERS = 2


class Undecided:
    """The samples of a batch that are computed again, apart from the batch, whose memory is not needed any more.

    Args:
        fast: float32 ``[N]``: the fast scores of all samples of the batch.
        is_near: bool ``[N]``: which of them float32 might decide otherwise.
        is_audited: bool ``[N]``: which are computed in float32 to see how far off they are.
        pixel_values: uint8 ``[N, 3, H, W]``, on the device if it has memory of its own.
        input_ids: int64 ``[N, L]`` or ``[N, K, L]``, on the host.
        image_embeds: float32 ``[N, D]``, fast ones, on the device.
        is_all_near: Whether nothing was known of the error, so that float32 has to decide everything.

    Attributes:
        num_samples: N.
        is_near: Of the M samples that are computed again, whether it is for their decision: bool ``[M]``.
        is_audited: Of these samples.
        pixel_values: Of these samples.
        input_ids: Likewise.
        image_embeds: Likewise.
        scores: float32 ``[3, M]``: fast; with the caption in float32; with the image in float32 too. NaN where not
            computed.
        num_fp32: int64 ``[M]``: how many towers were computed in float32; indexes each sample's best score.
        is_busy: bool ``[M]``: which are being computed.
        embeddings: ``[2, N, D]``: what is to be saved of the batch; None where nothing is.
        caption_embeds: By place among the M, the captions' embeddings in float32.
    """

    def __init__(
        self,
        fast: np.ndarray,
        is_near: np.ndarray,
        is_audited: np.ndarray,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        image_embeds: torch.Tensor,
        *,
        is_all_near: bool = False,
    ) -> None:
        self._fast, self._rows = fast, np.flatnonzero(is_near | is_audited)
        self.num_samples, self.is_all_near = len(fast), is_all_near
        self.is_near, self.is_audited = is_near[self._rows], is_audited[self._rows]
        self.input_ids, self.pixel_values, self.image_embeds = (
            _taken(tensor, self._rows) for tensor in (input_ids, pixel_values, image_embeds)
        )
        again = fast[self._rows]
        self.scores = np.stack([again, *[np.full_like(again, np.nan)] * NUM_TOWERS])
        self.num_fp32 = np.zeros(len(again), dtype=np.int64)
        self.is_busy = np.zeros(len(again), dtype=bool)
        self.embeddings: np.ndarray | None = None
        self.caption_embeds: dict[int, torch.Tensor] = {}

    def final_scores(self, num_fp32: np.ndarray) -> np.ndarray:
        """float32 ``[N]``: the scores of the batch, those of samples near the threshold with so many towers in float32.

        Args:
            num_fp32: int64 ``[M]``.
        """
        scores = self._fast.copy()
        best = self.scores[num_fp32, np.arange(len(num_fp32))]
        scores[self._rows[self.is_near]] = best[self.is_near]
        return scores

    def errors(self, places: np.ndarray) -> np.ndarray:
        """float32 ``[2, n]``: the errors of the fast scores of these samples, and of those with exact captions."""
        errors: np.ndarray = np.abs(self.scores[:NUM_TOWERS, places] - self.scores[NUM_TOWERS, places])
        return errors


def _taken(tensor: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """A copy of some rows."""
    return tensor[to_device(torch.from_numpy(rows), tensor.device)] if len(rows) else tensor[:0].clone()


def first_places(waiting: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    """The places of the first True ones of some masks, at most so many in all."""
    found = []
    for mask in waiting:
        places = np.flatnonzero(mask)[:most]
        most -= len(places)
        found.append(places)
    return found
