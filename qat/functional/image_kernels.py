"""The loops of fused chains of operations on images, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.elements import NUM_ADDEND, SMOOTH, Addend, Ends, passed
from qat.functional.inductor import Kernel
from qat.functional.kernels import GRID, GRID_OF_ADDEND


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


class ImageKernels(NamedTuple):
    """Compiled functions of images ``(N, C, S)`` or ``(N, S, C)``."""

    statistics: Kernel
    snap: Kernel
    sums: Kernel
    gradients: Kernel


def _over_images(axis: int, x: Tensor) -> Tensor:
    return x.sum(axis, keepdim=True).sum(0, keepdim=True)


def affine_channels(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Tensor | float
) -> Channels:
    """Return what a batch-norm does with these statistics; all of one shape.

    Args:
        mean: Of each channel.
        variance: The same.
        weight: Or ``None`` for 1.
        bias: Or ``None`` for 0.
        eps: What is added to the variance.
    """
    inverse = torch.rsqrt(variance + eps)
    gain = inverse if weight is None else weight * inverse
    shift = -mean * gain
    return Channels(gain, shift if bias is None else shift + bias, mean, inverse)


def _statistics(
    axis: int, c: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Tensor
) -> Any:
    """Return what a live batch-norm does to this batch, and the (biased) variance.

    The mean comes first and is subtracted: sums of squares alone lose small variances.
    """
    count = c.shape[0] * c.shape[axis]
    mean = _over_images(axis, c.float()) / count
    variance = _over_images(axis, (c.float() - mean).square()) / count
    return *affine_channels(mean, variance, weight, bias, eps), variance


class _Given(NamedTuple):
    addend: Addend
    channels: Channels
    ends: Ends

    def in_front(self, c: Tensor) -> Tensor:
        """Return what lies in front of the clamp."""
        return self.addend.add_to(c.float() * self.channels.gain + self.channels.shift)


def _given(inputs: Sequence[Tensor]) -> _Given:
    first, second = NUM_ADDEND, NUM_ADDEND + len(Channels._fields)
    return _Given(Addend(*inputs[:first]), Channels(*inputs[first:second]), Ends(*inputs[second:]))


def _snap(activation: str, c: Tensor, *inputs: Tensor) -> Any:
    given = _given(inputs)
    y = SMOOTH[activation].values(given.ends.clamp(given.in_front(c)))
    values, codes = given.ends.snap(y)
    return values.to(c.dtype), codes


def _sums(axis: int, activation: str, grad: Tensor, c: Tensor, *inputs: Tensor) -> Any:
    """Return the gradients of bias, weight and scale; axes of the first two are kept."""
    given = _given(inputs)
    moved, parts = passed(activation, grad, given.in_front(c), given.ends)
    of_gain = _over_images(axis, moved * (c.float() - given.channels.mean))
    return _over_images(axis, moved), of_gain * given.channels.inverse, parts.sum(axis).sum()


def _gradients(
    axis: int,
    activation: str,
    grad: Tensor,
    c: Tensor,
    of_bias: Tensor | None,
    of_weight: Tensor | None,
    *inputs: Tensor,
) -> Any:
    """Return the gradients of ``c`` and the addend; with those of bias and weight, live."""
    given = _given(inputs)
    channels = given.channels
    moved, _ = passed(activation, grad, given.in_front(c), given.ends)
    centred = moved
    if of_bias is not None and of_weight is not None:
        count = c.shape[0] * c.shape[axis]
        slope = of_weight * channels.inverse / count
        centred = moved - of_bias / count - (c.float() - channels.mean) * slope
    grad_c = (channels.gain * centred).to(c.dtype)
    return (grad_c,) if given.addend.values is None else (grad_c, moved.to(c.dtype))


@functools.cache
def image_kernels(device_type: str, axis: int, activation: str = "") -> ImageKernels:
    """Return the kernels of images whose pixels are on ``axis``: channels lie outside or inside.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        axis: 2 or 1.
        activation: What stands behind the clamp; a name in ``SMOOTH``.
    """
    images, channel = ("icp", "1c1") if axis == 2 else ("ipc", "11c")
    channels = (channel,) * len(Channels._fields)
    statistics, snap = functools.partial(_statistics, axis), functools.partial(_snap, activation)
    sums = functools.partial(_sums, axis, activation)
    gradients = functools.partial(_gradients, axis, activation)
    given = (images, *GRID_OF_ADDEND, *channels, *GRID)
    return ImageKernels(
        Kernel(device_type, statistics, (images, channel, channel, "")),
        Kernel(device_type, snap, (images, *given)),
        Kernel(device_type, sums, (images, images, *given)),
        Kernel(device_type, gradients, (images, images, channel, channel, *given)),
    )
