"""The first convolution together with the fake-quant of its input, whose gradient nobody needs.

An input image wants no gradient, but the scale of its grid does: a convolution's gradient of its
input, the dearest of all for three channels, is computed for one number. By the adjoint,
``sum(conv_transpose(g, w) * r) = sum(w * dw(r, g))``, where ``dw`` is the gradient of the weight
for an input ``r``: one more gradient of the weight, for the slopes of the grid, gives that number.
It is that of the operations up to the order of sums.

Slopes of the grid: Esser et al., arXiv:1902.08153, eq. 1-3.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.convolution import Convolution
from qat.functional.elements import Ends
from qat.functional.fused import Grid, is_worth_it
from qat.functional.inductor import Kernel
from qat.functional.kernels import GRID
from qat.functional.layout import Layout, flat


def _snap(x: Tensor, *ends: Tensor) -> Any:
    return (Ends(*ends).snap(x.float())[0],)


def _values_and_slopes(x: Tensor, *ends: Tensor) -> Any:
    grid, values = Ends(*ends), x.float()
    return grid.snap(values)[0], grid.terms(torch.ones_like(values), values)[1]


@functools.cache
def _kernels(device_type: str) -> tuple[Kernel, Kernel]:
    return tuple(Kernel(device_type, f, ("n", *GRID)) for f in (_snap, _values_and_slopes))  # pyright: ignore[reportReturnType]


class _How(NamedTuple):
    grid: Grid
    layout: Layout
    convolution: Convolution


class _FirstConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: _How, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor
    ) -> Tensor:
        ends, layout = how.grid.ends(), how.layout
        (values,) = _kernels(x.device.type)[0](layout.split(x), *ends)
        ctx.save_for_backward(x, weight, scale)
        ctx.how, ctx.ends, ctx.has_bias = how, ends, bias is not None
        return torch.conv2d(layout.join(values), weight, bias, *how.convolution)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grid, layout, convolution = ctx.how
        found = _kernels(x.device.type)[1](layout.split(x), *ctx.ends)
        values, slopes = (layout.join(part) for part in found)
        of_slopes, _ = convolution.weight_gradient(grads[0], slopes, weight)
        of_scale = (of_slopes * weight).sum().view(scale.shape).mul_(grid.factor)
        given = convolution.weight_gradient(grads[0], values, weight, ctx.has_bias)
        return None, None, *given, of_scale


def suits(x: Tensor, grid: Grid) -> bool:
    """Return whether ``first_conv`` takes images ``x`` on a grid, and that is a gain."""
    learns = grid.learned is not None and grid.scale.numel() == 1
    plain = x.ndim == 4 and x.dtype == torch.float32 and not x.requires_grad
    return learns and plain and is_worth_it(x) and not torch.is_autocast_enabled(x.device.type)


def first_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid, convolution: Convolution
) -> Tensor:
    """Return ``conv2d(fake_quantize(x), weight, bias)``.

    Args:
        x: Images that ``suits`` knows, ``(N, C, H, W)``.
        weight: In use, ``(O, C, H, W)``, float32.
        bias: ``(O,)``.
        grid: Of ``x``; with one scale, which learns.
        convolution: How it moves.
    """
    in_rows = weight.is_contiguous()
    # once here, or in each of the convolution's three calls
    x = x.contiguous(memory_format=torch.contiguous_format if in_rows else torch.channels_last)
    layout = flat(x)
    assert layout is not None
    return _FirstConv.apply(_How(grid, layout, convolution), x, weight, bias, grid.receiver)
