"""The loops of fused chains of operations on images, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.inductor import as_bytes, compile_for
from qat.functional.kernels import on_grid, terms


class Channels(NamedTuple):
    """What a batch-norm does to each channel, ``x * gain + shift``; shapes broadcast to pixels.

    Attributes:
        gain: Its weight over the standard deviation.
        shift: Its bias less the scaled mean.
        mean: Of the batch, or running.
        inverse: 1 over the standard deviation.
    """

    gain: Tensor
    shift: Tensor
    mean: Tensor
    inverse: Tensor


class Ends(NamedTuple):
    """A grid with one scale, behind a clamp; all of shape ``()``."""

    scale: Tensor
    low: Tensor
    high: Tensor
    floor: Tensor
    ceiling: Tensor


class Kernels(NamedTuple):
    """Compiled functions of images ``(N, C, S)`` or ``(N, S, C)``."""

    moments: Callable[..., tuple[Tensor, Tensor]]
    snap: Callable[..., tuple[Tensor, Tensor]]
    sums: Callable[..., tuple[Tensor, ...]]
    gradients: Callable[..., tuple[Tensor, ...]]


def _moments(axis: int, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and (biased) variance of each channel, axes kept.

    The mean comes first and is subtracted: sums of squares alone lose small variances.
    """
    count = c.shape[0] * c.shape[axis]
    mean = c.float().sum(axis, keepdim=True).sum(0, keepdim=True) / count
    squares = (c.float() - mean).square()
    return mean, squares.sum(axis, keepdim=True).sum(0, keepdim=True) / count


def _clamped(
    c: Tensor, other: Tensor | None, channels: Channels, ends: Ends
) -> tuple[Tensor, Tensor]:
    """Return what lies in front of the clamp, and behind it."""
    y = c.float() * channels.gain + channels.shift
    y = y if other is None else y + other.float()
    return y, torch.minimum(torch.maximum(y, ends.floor), ends.ceiling)


def _snap(c: Tensor, other: Tensor | None, channels: Channels, ends: Ends) -> tuple[Tensor, Tensor]:
    _, x = _clamped(c, other, channels, ends)
    whole = on_grid(x, ends.scale, ends.low, ends.high)
    return (whole * ends.scale).to(c.dtype), as_bytes(whole - ends.low)


def _passed(
    grad: Tensor, c: Tensor, other: Tensor | None, channels: Channels, ends: Ends
) -> tuple[Tensor, Tensor]:
    """Return the gradient in front of the clamp, and what each element adds to the scale's."""
    y, x = _clamped(c, other, channels, ends)
    moved, parts = terms(grad.float(), x, ends.scale, ends.low, ends.high)
    return moved * ((y > ends.floor) & (y < ends.ceiling)), parts


def _sums(
    axis: int, grad: Tensor, c: Tensor, other: Tensor | None, channels: Channels, ends: Ends
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of bias, weight and scale; axes of the first two are kept."""
    moved, parts = _passed(grad, c, other, channels, ends)
    centred = moved * (c.float() - channels.mean)
    of_bias, of_gain = (
        part.sum(axis, keepdim=True).sum(0, keepdim=True) for part in (moved, centred)
    )
    return of_bias, of_gain * channels.inverse, parts.sum(axis).sum()


def _gradients(
    axis: int,
    grad: Tensor,
    c: Tensor,
    other: Tensor | None,
    channels: Channels,
    ends: Ends,
    through: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``c`` and ``other``; with those of bias and weight, live."""
    moved, _ = _passed(grad, c, other, channels, ends)
    centred = moved
    if through is not None:
        of_bias, of_weight = through
        count = c.shape[0] * c.shape[axis]
        slope = of_weight * channels.inverse / count
        centred = moved - of_bias / count - (c.float() - channels.mean) * slope
    grad_c = (channels.gain * centred).to(c.dtype)
    return (grad_c,) if other is None else (grad_c, moved.to(other.dtype))


def _moments_outer(c: Tensor) -> Any:
    return _moments(2, c)


def _moments_inner(c: Tensor) -> Any:
    return _moments(1, c)


def _sums_outer(*inputs: Any) -> Any:
    return _sums(2, *inputs)


def _sums_inner(*inputs: Any) -> Any:
    return _sums(1, *inputs)


def _gradients_outer(*inputs: Any) -> Any:
    return _gradients(2, *inputs)


def _gradients_inner(*inputs: Any) -> Any:
    return _gradients(1, *inputs)


_FUNCTIONS = {  # each with a body of its own: torch keeps what it compiled by code
    2: (_moments_outer, _snap, _sums_outer, _gradients_outer),
    1: (_moments_inner, _snap, _sums_inner, _gradients_inner),
}


@functools.cache
def image_kernels(device_type: str, axis: int) -> Kernels:
    """Return the kernels of images whose pixels are on ``axis``: channels lie outside or inside."""
    return Kernels(*(compile_for(device_type, f) for f in _FUNCTIONS[axis]))
