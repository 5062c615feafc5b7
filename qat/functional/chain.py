"""Batch-norm, residual addition, ReLU and fake-quantization in one pass over memory each way.

One by one these operations read and write every element again and again, and keep it twice for the
backward: in front of the batch-norm and behind the ReLU. Here a statistics pass and one loop go
forward, two loops go backward, and what is kept is the convolution's output alone; what lies
behind it is computed again. The numbers are those of the operations up to the order of sums.

Gradients of the batch-norm: Ioffe and Szegedy, arXiv:1502.03167, section 3; of the fake-quant:
Esser et al., arXiv:1902.08153, eq. 1-3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.fused import Grid, is_worth_it
from qat.functional.image_kernels import Channels, Ends, image_kernels
from qat.functional.kept import keep
from qat.functional.kernels import rebuild_codes
from qat.functional.layout import Images, find_images


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
        made, channels = image_kernels(c.device.type, images.axis), norm.channels(images)
        ends = Ends(grid.scale.detach().reshape(()), *grid.ends(c.device))
        second = None if other is None else images.split(other)
        values, codes = made.snap(images.split(c), second, channels, ends)
        dtype = c.dtype

        def rebuild(kept: Tensor) -> Tensor:
            return images.join(rebuild_codes(kept.flatten(), ends.scale, ends.low).to(dtype))

        ctx.save_for_backward(c, other)
        ctx.how, ctx.channels, ctx.ends = how, channels, ends
        return keep(images.join(values), codes, rebuild)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (c, other), (norm, grid, images) = ctx.saved_tensors, ctx.how
        made = image_kernels(c.device.type, images.axis)
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
    mean, variance = image_kernels(c.device.type, images.axis).moments(images.split(c))
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
