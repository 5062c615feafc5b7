"""Batch-norm, residual addition, ReLU and fake-quantization in one pass over memory each way.

One by one these operations read and write every element again and again, and keep it twice for the
backward: in front of the batch-norm and behind the ReLU. Here a statistics pass and one loop go
forward, two loops go backward, and what is kept is the convolution's output alone; what lies
behind it is computed again. The numbers are those of the operations up to the order of sums.

Gradients of the batch-norm: Ioffe and Szegedy, arXiv:1502.03167, section 3; of the fake-quant:
Esser et al., arXiv:1902.08153, eq. 1-3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.fused import Grid, as_bytes, compile_for, is_worth_it, terms
from qat.functional.kept import keep
from qat.functional.layout import Images, find_images


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
    rebuild: Callable[..., Tensor]
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
    whole = torch.minimum(torch.maximum((x / ends.scale).round(), ends.low), ends.high)
    return (whole * ends.scale).to(c.dtype), as_bytes(whole - ends.low)


def _rebuild(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return (codes.float() + low) * scale


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
    2: (_moments_outer, _snap, _rebuild, _sums_outer, _gradients_outer),
    1: (_moments_inner, _snap, _rebuild, _sums_inner, _gradients_inner),
}


@functools.cache
def _kernels(device_type: str, axis: int) -> Kernels:
    """Return the kernels of images whose pixels are on ``axis``: channels lie outside or inside."""
    return Kernels(*(compile_for(device_type, f) for f in _FUNCTIONS[axis]))


class Norm(NamedTuple):
    """A batch-norm in use.

    Attributes:
        mean: Of each channel, of the batch or running, ``(C,)``.
        variance: The same.
        weight: Or ``None`` for 1.
        bias: Or ``None`` for 0.
        eps: What is added to the variance.
        follows_batch: Whether mean and variance are those of this batch: gradients pass them.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    follows_batch: bool

    @torch.no_grad()
    def channels(self, images: Images) -> Channels:
        """Return what it does, in the layout of ``images``."""
        inverse = torch.rsqrt(self.variance + self.eps)
        gain = inverse if self.weight is None else self.weight * inverse
        shift = -self.mean * gain
        shift = shift if self.bias is None else shift + self.bias
        mean = self.mean.clone()  # a running one may move before the backward
        return Channels(*(images.channels(t) for t in (gain, shift, mean, inverse)))


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Norm, Grid, Images],
        c: Tensor,
        other: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        del parameters  # weight, bias and scale are in ``how``; they stand here for their gradients
        norm, grid, images = how
        made, channels = _kernels(c.device.type, images.axis), norm.channels(images)
        ends = Ends(grid.scale.detach().reshape(()), *grid.ends(c.device))
        second = None if other is None else images.split(other)
        values, codes = made.snap(images.split(c), second, channels, ends)
        dtype = c.dtype

        def rebuild(kept: Tensor) -> Tensor:
            return images.join(made.rebuild(kept, ends.scale, ends.low).to(dtype))

        ctx.save_for_backward(c, other)
        ctx.how, ctx.channels, ctx.ends = how, channels, ends
        return keep(images.join(values), codes, rebuild)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (c, other), (norm, grid, images) = ctx.saved_tensors, ctx.how
        made = _kernels(c.device.type, images.axis)
        second = None if other is None else images.split(other)
        inputs = images.split(grads[0]), images.split(c), second, ctx.channels, ctx.ends
        of_bias, of_weight, of_scale = made.sums(*inputs)
        found = made.gradients(*inputs, (of_bias, of_weight) if norm.follows_batch else None)
        grad_c, grad_other = images.join(found[0]), None if other is None else images.join(found[1])
        grad_scale = of_scale.view(grid.scale.shape).mul_(grid.factor)
        return None, grad_c, grad_other, of_weight.flatten(), of_bias.flatten(), grad_scale


def can_fuse(c: Tensor, other: Tensor | None) -> bool:
    """Return whether ``run_chain`` takes images ``c`` and what is added to them."""
    same = other is None or (other.shape, other.dtype) == (c.shape, c.dtype)
    return same and is_worth_it(c) and find_images(c) is not None


@torch.no_grad()
def batch_moments(c: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and (biased) variance of each channel, shape ``(C,)``.

    Args:
        c: Images ``(N, C, H, W)`` that ``can_fuse`` takes.
    """
    images = find_images(c)
    assert images is not None
    mean, variance = _kernels(c.device.type, images.axis).moments(images.split(c))
    return mean.flatten(), variance.flatten()


def run_chain(c: Tensor, other: Tensor | None, norm: Norm, grid: Grid) -> Tensor:
    """Return ``fake_quantize(clamp(norm(c) + other))`` of images that ``can_fuse`` takes.

    Args:
        c: What the batch-norm reads, ``(N, C, H, W)``, real values.
        other: What is added behind it, of the same shape, if anything is.
        norm: The batch-norm.
        grid: What follows; with one scale, and at most 256 codes.
    """
    images = find_images(c)
    assert images is not None
    return _Chain.apply((norm, grid, images), c, other, norm.weight, norm.bias, grid.scale)
