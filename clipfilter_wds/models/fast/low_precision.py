"""Makes the towers that embed fast: with less to do, and in low precision."""

import copy

import torch

from clipfilter_wds.models.dual_encoder import DualEncoder, Towers
from clipfilter_wds.models.fast.optimize import optimize_layers
from clipfilter_wds.models.fast.patches import normalize_in_weights
from clipfilter_wds.models.fast.text_tower import optimize_text_tower
from clipfilter_wds.models.precision import to_low_precision


def low_precision_towers(model: DualEncoder, dtype: torch.dtype, *, packed: bool) -> tuple[Towers, bool]:
    """Copy the towers of a model, rewrite what is of known kinds, and put them in low precision.

    Args:
        model: With towers in float32, which stay as they are.
        dtype: What matrices are to be multiplied in.
        packed: Whether captions may be computed without their padding, in shapes that depend on them.

    Returns:
        The towers, and whether they do compute captions so.
    """
    towers = copy.deepcopy(model.towers)
    optimize_layers(towers)
    towers.normalizes = normalize_in_weights(towers, model.pixel_mean, model.pixel_std)
    is_packed = optimize_text_tower(towers, packed=packed) and packed
    to_low_precision(towers, dtype)
    return towers, is_packed
