"""Gives every sample a finite score or a reason why it has none."""

import numpy as np

from clipfilter_wds.types import NO_REASON, REASON_CODES, DropReason


def finite_scores(reasons: np.ndarray, cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put the cosines of the usable samples among the others. One that is NaN or infinite counts as ``not_finite``.

    Args:
        reasons: Per sample, why it could not be scored: int8 ``[N]`` of ``REASON_CODES``, or ``NO_REASON``.
        cosines: float32 ``[M]``: those of the M samples without a reason, in the same order.

    Returns:
        Per sample, float32 ``[N]``, its score, 0.0 where there is a reason; and its reason, int8 ``[N]``.

    Raises:
        ValueError: When there are not as many cosines as usable samples.
    """
    usable = reasons == NO_REASON
    if len(cosines) != usable.sum():
        raise ValueError(f"{usable.sum()} samples could be scored, and there are {len(cosines)} scores")
    scores = np.zeros(len(reasons), dtype=np.float32)
    scores[usable] = cosines
    finite = np.isfinite(scores)
    checked = np.where(finite, reasons, np.int8(REASON_CODES[DropReason.NOT_FINITE]))
    return np.where(finite, scores, np.float32(0.0)), checked
