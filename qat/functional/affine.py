"""The arithmetic of integer grids: ``code = clamp(round(x / scale) + zero_point)`` and back.

Rounding is half to even and the division is a real division, as in ONNX QuantizeLinear: a product
with the reciprocal moves values across ties. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qat.functional.ste import power_of_two, replace_value
from qat.spec import QuantSpec

MIN_SCALE = 2.0**-26
MAX_BIAS_CODE = 2**30
Rounding = Callable[[Tensor], Tensor]
"""Values in steps → whole numbers beside them."""


def full_precision(x: Tensor) -> Tensor:
    """Return real values as float32; integers, such as tokens, stay what they are."""
    return x.float() if x.is_floating_point() else x


def expand(scale: Tensor, shape: torch.Size) -> Tensor:
    """Repeat the blocks of ``scale`` so that it broadcasts against a tensor of ``shape``.

    Args:
        scale: Rank 0, or the rank of the tensor with, on each axis, 1, the tensor's own size, or
            a divisor of it (one entry per block of consecutive indices).
        shape: The tensor's shape.
    """
    for axis in range(scale.ndim):
        blocks = scale.shape[axis]
        if blocks not in (1, shape[axis]):
            scale = scale.repeat_interleave(shape[axis] // blocks, dim=axis)
    return scale


def reduce_to(x: Tensor, shape: torch.Size, how: Callable[..., Tensor] = torch.sum) -> Tensor:
    """Sum ``x`` down to a scale's ``shape``: the adjoint of ``expand`` and broadcasting.

    Args:
        x: Real values. Shape ``(...)``.
        shape: A shape that ``expand`` takes for ``x``.
        how: What to do instead of a sum, such as ``torch.amax``.
    """
    if not shape:
        return how(x)
    for axis, blocks in enumerate(shape):
        if blocks == 1:
            x = how(x, axis, keepdim=True)
        elif blocks != x.shape[axis]:
            x = how(x.unflatten(axis, (blocks, -1)), axis + 1)
    return x


def mean_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Average ``x`` down to a scale's ``shape``.

    Args:
        x: Real values. Shape ``(...)``.
        shape: A shape that ``expand`` takes for ``x``.
    """
    return reduce_to(x, shape) / (x.numel() // shape.numel())


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    rounding: Rounding | None = None,
) -> Tensor:
    """Return the integer codes of ``x`` as float32, shape of ``x``.

    Args:
        x: Real values. Shape ``(...)``.
        scale: Grid spacing in the units of ``x``, positive; a shape that ``expand`` takes.
        zero_point: Code of the real value 0; shape of ``scale``.
        qmin: Lowest code.
        qmax: Highest code.
        rounding: How to round, instead of half to even; a new tensor.
    """
    steps = x.float() / expand(scale, x.shape)
    steps = steps.round_() if rounding is None else rounding(steps)
    return steps.add_(expand(zero_point, x.shape)).clamp_(qmin, qmax)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the real values of integer ``codes``, shape of ``codes``.

    The result is a new tensor: of one that was changed in place, or converted to the type that it
    has, dynamo of torch 2.11 loses the gradient when it comes out of an ``autograd.Function``.

    Args:
        codes: Integers, of any dtype. Shape ``(...)``.
        scale: Grid spacing in real units; a shape that ``expand`` takes.
        zero_point: Code of the real value 0; shape of ``scale``.
        dtype: Of the values, which are computed in float32.
    """
    values = (codes.float() - expand(zero_point, codes.shape)) * expand(scale, codes.shape)
    return values if dtype == torch.float32 else values.to(dtype)


def _cover(end: Tensor, code: int) -> Tensor:
    scale = end / code  # may round down; then ``end`` would count as clipped and get no gradient
    return torch.where(end / scale > code, scale * (1 + 2.0**-23), scale)


def scale_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the finest ``(scale, zero_point)`` whose grid covers ``low`` to ``high`` and 0.

    Args:
        low: Lowest real values, shape of the scale.
        high: Highest real values, shape of the scale.
        spec: The format; symmetric unsigned grids cover only 0 to ``high``.

    Returns:
        Positive scales in real units, and zero points as float32 integers inside the grid.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if spec.symmetric:
        scale = _cover(high, spec.qmax)
        if spec.signed:
            scale = torch.maximum(scale, _cover(-low, -spec.qmin))
    else:
        scale = (high - low) / (spec.qmax - spec.qmin)
    scale = scale.clamp_min(MIN_SCALE)
    if spec.power_of_two:
        scale = power_of_two(scale, up=True)
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (spec.qmin - low / scale).round().clamp(spec.qmin, spec.qmax)


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return the int32 codes of ``bias`` on the grid of an accumulator, shape ``(O,)``.

    Computed in float64: float32 cannot hold the ends of int32, and wraps there.

    Args:
        bias: Real values. Shape ``(O,)``.
        scale: Input scale times weight scale. Shape ``()`` or ``(O,)``.
    """
    codes = (bias.double() / scale.double()).round()
    return codes.clamp(-MAX_BIAS_CODE, MAX_BIAS_CODE).to(torch.int32)


def fake_quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Snap ``bias`` to the int32 grid of ``scale``, with gradient 1. Shape ``(O,)``.

    Args:
        bias: Real values. Shape ``(O,)``.
        scale: Input scale times weight scale. Shape ``()`` or ``(O,)``.
    """
    codes = quantize_bias(bias.detach(), scale.detach())
    return replace_value(codes.float() * scale.detach(), bias)
