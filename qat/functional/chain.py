"""Batch-norm, residual addition, activation and fake-quantization in one pass over memory each way.

One by one these operations read and write every element again and again, and keep it twice for the
backward: in front of the batch-norm and behind the activation. Here a statistics pass and one loop
go forward, two loops go backward, and what is kept is the convolution's output alone; what lies
behind it is computed again. The numbers are those of the operations up to the order of sums.

Gradients of the batch-norm: Ioffe and Szegedy, arXiv:1502.03167, section 3; of the fake-quant:
Esser et al., arXiv:1902.08153, eq. 1-3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.fused import (
    Front,
    Grid,
    find_addend,
    is_worth_it,
    keep_values,
    save_with_addend,
    saved_with_addend,
)
from qat.functional.image_kernels import Channels, ImageKernels, affine_channels, image_kernels
from qat.functional.inductor import bound
from qat.functional.layout import Layout, find_images


class Norm(NamedTuple):
    """A batch-norm in use.

    Attributes:
        channels: What it does to each channel of these images, broadcasting to their pixels.
        weight: Or ``None`` for 1, ``(C,)``.
        bias: Or ``None`` for 0, ``(C,)``.
        follows_batch: Whether its statistics are those of this batch: gradients pass them.
    """

    channels: Channels
    weight: Tensor | None
    bias: Tensor | None
    follows_batch: bool


class Running(NamedTuple):
    """Running statistics of a batch-norm.

    Attributes:
        mean: Of each channel, ``(C,)``.
        variance: The same.
        share: What a batch counts for in them, 0 to 1.
    """

    mean: Tensor
    variance: Tensor
    share: float = 0.0


class _How(NamedTuple):
    norm: Norm
    grid: Grid
    layout: Layout
    made: ImageKernels


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: _How, c: Tensor, other: Tensor | None, *parameters: Tensor | None
    ) -> Tensor:
        del parameters  # weight, bias and scale are in ``how``; they stand here for their gradients
        layout, channels, ends = how.layout, how.norm.channels, how.grid.ends()
        addend = find_addend(other, layout)
        values, codes = how.made.snap(layout.split(c), *addend, *channels, *ends)
        save_with_addend(ctx, c, other, addend, how.grid.scale)
        ctx.how, ctx.ends = how, ends
        return keep_values(values, codes.view(-1), how.grid, ends, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how = ctx.how
        layout, made = how.layout, how.made
        c, addend, scale = saved_with_addend(ctx, layout)
        images = layout.split(grads[0]), layout.split(c)
        given = addend + how.norm.channels + ctx.ends
        of_bias, of_weight, of_scale = made.sums(*images, *given)
        sums = (of_bias, of_weight) if how.norm.follows_batch else (None, None)
        grad_c, *of_other = (layout.join(g) for g in made.gradients(*images, *sums, *given))
        grad_other = of_other[0] if of_other else None
        grad_scale = of_scale.view(scale.shape).mul_(how.grid.factor)
        return None, grad_c, grad_other, of_weight.view(-1), of_bias.view(-1), grad_scale


def can_fuse(c: Tensor, other: Tensor | None) -> bool:
    """Return whether kernels take ``c`` and what is added to it."""
    same = other is None or (other.shape, other.dtype) == (c.shape, c.dtype)
    return same and is_worth_it(c)


@torch.no_grad()
def live_norm(
    c: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: Running
) -> Norm:
    """Return the batch-norm by the statistics of images ``c``, which the running ones follow.

    Args:
        c: Images ``(N, C, H, W)`` that ``find_images`` knows.
        weight: ``(C,)``, or ``None`` for 1.
        bias: ``(C,)``, or ``None`` for 0.
        eps: What is added to the variance.
        running: Statistics that are changed in place.
    """
    layout, axis = _images(c)
    shape = (1, -1, 1) if axis == 2 else (1, 1, -1)
    affine = [None if values is None else values.view(shape) for values in (weight, bias)]
    statistics = image_kernels(c.device.type, axis).statistics
    *found, variance = statistics(layout.split(c), *affine, bound(eps, c.device))
    channels, count = Channels(*found), c.numel() // c.shape[1]
    running.mean.lerp_(channels.mean.view(-1), running.share)
    running.variance.lerp_(variance.view(-1) * (count / (count - 1)), running.share)
    return Norm(channels, weight, bias, follows_batch=True)


@torch.no_grad()
def frozen_norm(
    c: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: Running
) -> Norm:
    """Return the batch-norm by its running statistics; arguments are those of ``live_norm``."""
    mean = running.mean.clone()  # it may move before the backward
    channels = affine_channels(mean, running.variance, weight, bias, eps)
    shape = (1, -1, 1) if _images(c)[1] == 2 else (1, 1, -1)
    seen = Channels(*(values.view(shape) for values in channels))
    return Norm(seen, weight, bias, follows_batch=False)


def run_chain(c: Tensor, norm: Norm, grid: Grid, front: Front) -> Tensor:
    """Return ``fake_quantize(activation(clamp(norm(c) + other)))`` of images ``find_images`` knows.

    Args:
        c: What the batch-norm reads, ``(N, C, H, W)``, real values.
        norm: The batch-norm.
        grid: What follows; with one scale, and at most 256 codes.
        front: What stands between them.
    """
    layout, axis = _images(c)
    how = _How(norm, grid, layout, image_kernels(c.device.type, axis, front.activation))
    return _Chain.apply(how, c, front.other, norm.weight, norm.bias, grid.receiver)


def _images(c: Tensor) -> tuple[Layout, int]:
    found = find_images(c)
    assert found is not None
    return found
