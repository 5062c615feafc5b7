"""Scales that are computed from the very tensor they are for."""

from __future__ import annotations

import torch
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


def tensor_grid(x: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Return the grid from 0 to ``qmax`` that just covers a whole tensor and 0.

    Source: DynamicQuantizeLinear of ONNX, which has 8 bits, with the rounding of its kernel in
    onnxruntime; a tensor of zeros has the scale 1.

    Args:
        x: Real values, float32. Shape ``(...)``.
        qmax: Highest code; the lowest is 0.

    Returns:
        A positive scale in the units of ``x``, and the code of 0, as float32; both ``()``.
    """
    low, high = (end.to(torch.float32) for end in torch.aminmax(x))
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    span = high - low
    scale = torch.where(span > 0, span / qmax, torch.ones_like(span))
    return scale, (-low / scale).clamp(0, qmax).round()
