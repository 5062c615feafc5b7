"""Convolutions of images, whose gradients can be had one by one.

torch computes the gradient of the input and that of the weight in one call, with both factors and
all that is made on the way in memory. Where a weight is large, one after the other needs less of
it: the weight is let go before the gradient of the weight is made. The numbers are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.fused import is_worth_it
from qat.functional.kept import save_apart, saved_apart

LARGE = 2**20
"""Values of a weight from which on memory is worth one more call, of some 0.1 ms."""


class Convolution(NamedTuple):
    """What a convolution is called with.

    Attributes:
        stride: Of each spatial axis.
        padding: The same.
        dilation: The same.
        groups: Of channels.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int = 1

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of ``x``, whose values do not matter."""
        return self._gradients(grad, x, weight, None, [True, False, False])[0]

    def weight_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of ``weight``, whose values do not matter, and of a bias."""
        biases = [weight.shape[0]] if has_bias else None
        return self._gradients(grad, x, weight, biases, [False, True, has_bias])[1:]

    def _gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, biases: list[int] | None, wanted: list[bool]
    ) -> Any:
        ways = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        return torch.ops.aten.convolution_backward(grad, x, weight, biases, *ways, wanted)


class _OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        save_apart(ctx, x, weight)
        ctx.how, ctx.has_bias = how, bias is not None
        return torch.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        blank_weight = saved_apart(ctx, 1, blank=True)
        in_rows = blank_weight.is_contiguous()
        order = torch.contiguous_format if in_rows else torch.channels_last
        grad = grads[0].contiguous(memory_format=order)  # once, or in both calls
        of_x = None
        if ctx.needs_input_grad[1]:
            blank_x = saved_apart(ctx, 0, blank=True)
            of_x = ctx.how.input_gradient(grad, blank_x, saved_apart(ctx, 1))
            del blank_x
        given = ctx.how.weight_gradient(grad, saved_apart(ctx, 0), blank_weight, ctx.has_bias)
        return None, of_x, *given


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Return whether ``convolve_large`` takes ``x`` and ``weight``, and that is a gain."""
    floats = x.dtype == weight.dtype == torch.float32 and x.ndim == 4
    wanted = weight.requires_grad and weight.numel() >= LARGE and torch.is_grad_enabled()
    return floats and wanted and is_worth_it(x) and not torch.is_autocast_enabled(x.device.type)


def convolve_large(x: Tensor, weight: Tensor, bias: Tensor | None, how: Convolution) -> Tensor:
    """Return ``conv2d(x, weight, bias)``; the backward computes one gradient after the other.

    Args:
        x: Images ``(N, C, H, W)`` that ``is_large`` knows.
        weight: In use, ``(O, C / groups, H, W)``, float32.
        bias: ``(O,)``.
        how: How the convolution moves.
    """
    return _OneByOne.apply(how, x, weight, bias)
