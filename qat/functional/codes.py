"""Quantize and dequantize as operators with real integer tensors, for converted models.

They are registered with torch (``qat::quantize`` and others), so that an exporter sees one node
where a runtime has one operator, and running them computes exactly what that node does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.functional.dynamic import tensor_grid


@torch.library.custom_op("qat::quantize", mutates_args=())
def quantize_codes(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return the codes of real values ``x``, dtype of ``zero_point``, held in ``qmin..qmax``.

    Args:
        x: Real values. Shape ``(...)``.
        scale: Grid spacing, shape ``()``.
        zero_point: Code of 0, an integer tensor of shape ``()``; its dtype stores the codes.
        qmin: Lowest code.
        qmax: Highest code.
    """
    steps = (x / scale).round_().add_(zero_point.to(torch.float32))
    return steps.clamp_(qmin, qmax).to(zero_point.dtype)


@quantize_codes.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    del scale, qmin, qmax
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("qat::lookup", mutates_args=())
def look_up(x: Tensor, thresholds: Tensor, values: Tensor) -> Tensor:
    """Return ``values[number of thresholds <= x]``, shape of ``x``.

    Args:
        x: Real values. Shape ``(...)``.
        thresholds: Ascending real values, shape ``(n,)``.
        values: Shape ``(n + 1,)``.
    """
    return values[torch.bucketize(x, thresholds, right=True)]


@look_up.register_fake
def _(x: Tensor, thresholds: Tensor, values: Tensor) -> Tensor:
    del thresholds
    return torch.empty_like(x, dtype=values.dtype)


@torch.library.custom_op("qat::quantize_dynamic", mutates_args=())
def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes of real values ``x``, and the scale and zero point that it brings.

    Args:
        x: Real values. Shape ``(...)``.

    Returns:
        Codes, shape of ``x``; the scale, real units, float32 ``()``; the code of 0, uint8 ``()``.
    """
    scale, offset = tensor_grid(x, 255)
    zero_point = offset.to(torch.uint8)
    return quantize_codes(x, scale, zero_point, 0, 255), scale, zero_point


@quantize_dynamic.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty((), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.uint8), scale, scale.to(torch.uint8)


@torch.library.custom_op("qat::dequantize", mutates_args=())
def dequantize_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block: int
) -> Tensor:
    """Return the real values of ``codes``, float32, laid out as ONNX DequantizeLinear wants it.

    Args:
        codes: Integers. Shape ``(...)``.
        scale: Shape ``()``; or ``(codes.shape[axis],)``; or, with ``block``, the shape of
            ``codes`` with ``axis`` divided by ``block``.
        zero_point: Integers of the shape of ``scale``, or ``None`` for 0.
        axis: The channel or block axis.
        block: Consecutive indices of ``axis`` that share a scale; 0 for none.
    """
    steps = codes.to(torch.float32)
    if zero_point is not None:
        steps -= _spread(zero_point.to(torch.float32), codes, axis, block)
    return steps * _spread(scale, codes, axis, block)


def _spread(values: Tensor, codes: Tensor, axis: int, block: int) -> Tensor:
    if block:
        return values.repeat_interleave(block, dim=axis)
    if values.ndim == 1 and codes.ndim > 1:
        return values.view([-1 if i == axis else 1 for i in range(codes.ndim)])
    return values


@dequantize_codes.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block: int) -> Tensor:
    del scale, zero_point, axis, block
    return torch.empty_like(codes, dtype=torch.float32)
