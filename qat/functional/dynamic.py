"""Scales that are computed from the very tensor they are for."""

from __future__ import annotations

from torch import Tensor

from qat.functional.affine import MIN_SCALE


def token_scale(x: Tensor, qmax: int) -> Tensor:
    """Return the scale of every row along the last axis: its largest magnitude over ``qmax``.

    Plain operations, which every exporter knows; a row of zeros has the least scale that there is.

    Args:
        x: Real values, float32. Shape ``(..., C)``.
        qmax: Highest code.

    Returns:
        Positive scales in the units of ``x``, shape ``(..., 1)``.
    """
    return (x.abs().amax(-1, keepdim=True) / qmax).clamp_min(MIN_SCALE)
