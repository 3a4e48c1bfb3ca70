"""Gives every sample a finite score or a reason why it has none."""

from collections.abc import Sequence

import numpy as np

from clipfilter_wds.types import DropReason


def finite_scores(
    reasons: Sequence[DropReason | None], cosines: np.ndarray
) -> tuple[np.ndarray, list[DropReason | None]]:
    """Put the cosines of the usable samples among the others. One that is NaN or infinite counts as ``not_finite``.

    Args:
        reasons: Per sample, why it could not be scored, or None.
        cosines: float32 ``[M]``: those of the M samples without a reason, in the same order.

    Returns:
        Per sample, float32 ``[N]``, its score, 0.0 where there is a reason; and its reason, or None.

    Raises:
        ValueError: When there are not as many cosines as usable samples.
    """
    usable = np.array([reason is None for reason in reasons], dtype=bool)
    if len(cosines) != usable.sum():
        raise ValueError(f"{usable.sum()} samples could be scored, and there are {len(cosines)} scores")
    scores = np.zeros(len(reasons), dtype=np.float32)
    scores[usable] = cosines
    finite = np.isfinite(scores)
    checked = [reason if ok else DropReason.NOT_FINITE for reason, ok in zip(reasons, finite, strict=True)]
    return np.where(finite, scores, np.float32(0.0)), checked
