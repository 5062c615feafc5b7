"""Fake-quantization on integer grids, with straight-through gradients for values and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.functional.affine import Rounding, dequantize, expand, quantize, reduce_to
from qat.functional.fused import Grid, fused_fake_quantize
from qat.spec import QuantSpec

Estimator = Callable[[Tensor, Tensor], Tensor]
"""Gradient of a rounded value, and how far it lies above its code, in steps → that of its input."""


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        grid: tuple[int, int, float],
        estimate: Estimator | None,
        rounding: Rounding | None,
    ) -> Tensor:
        qmin, qmax, _ = grid
        rounded = None  # to the nearest can be done again, by chance cannot
        if rounding is not None:
            rounded = rounding(x.float() / expand(scale, x.shape))
            codes = (rounded + expand(zero_point, x.shape)).clamp_(qmin, qmax)
        else:
            codes = quantize(x, scale, zero_point, qmin, qmax)
        ctx.save_for_backward(x, scale, zero_point, rounded)
        ctx.grid, ctx.estimate = grid, estimate
        dtype = torch.float32 if qmax - qmin > 255 else x.dtype  # half floats hold no wider codes
        return dequantize(codes, scale, zero_point, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, rounded = ctx.saved_tensors
        qmin, qmax, factor = ctx.grid
        grad = grads[0].float()
        offset = expand(zero_point, x.shape)
        steps = x.float() / expand(scale, x.shape)
        inside = (steps >= qmin - offset) & (steps <= qmax - offset)
        whole = steps.round() if rounded is None else rounded
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            passed = grad if ctx.estimate is None else ctx.estimate(grad, steps - whole)
            grad_x = (passed * inside).to(x.dtype)
        if ctx.needs_input_grad[1]:
            clipped = torch.minimum(torch.maximum(whole, qmin - offset), qmax - offset)
            slope = torch.where(inside, whole - steps, clipped)
            grad_scale = reduce_to(grad * slope, scale.shape).mul_(factor)
        return grad_x, grad_scale, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    *,
    factor: float = 1.0,
    estimate: Estimator | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """Snap ``x`` to the grid of ``spec``, with straight-through gradients for ``x`` and ``scale``.

    ``x`` receives gradient 1 where ``x / scale`` lies inside the grid (ends included), else 0.
    ``scale`` receives ``factor`` times the sum over the elements that share it of
    ``round(v) - v`` inside, and the end of the grid that clipped outside, with ``v = x / scale``.

    Args:
        x: Real values, any float dtype; the arithmetic is float32 also under autocast.
        scale: Grid spacing in the units of ``x``, positive; a shape that ``expand`` takes.
        zero_point: Code of the real value 0; shape of ``scale``.
        spec: The number format.
        factor: Multiplies the gradient of ``scale``.
        estimate: What the gradient of ``x`` is inside the grid, instead of straight through.
        rounding: What ``round`` is, instead of half to even.

    Returns:
        Real values on the grid: shape and dtype of ``x``, but float32 for codes over 8 bits.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153, eq. 1-3.

    Example:
        >>> one = torch.tensor(0.5)
        >>> fake_quantize(torch.tensor([-3.0, 0.3, 9.0]), one, one * 0, QuantSpec(2))
        tensor([-1.0000,  0.5000,  0.5000])
    """
    grid = (spec.qmin, spec.qmax, factor)
    if estimate is None and rounding is None:
        y = fused_fake_quantize(x, Grid(scale, zero_point, *grid))
        if y is not None:
            return y
    return _FakeQuantize.apply(x, scale, zero_point, grid, estimate, rounding)
