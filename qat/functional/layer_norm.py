"""Layer-norm and fake-quantization in one pass over memory each way.

One by one they keep what lies in front of the layer-norm and behind it; here only the first, and
mean and deviation of each row; what lies behind is computed again in the backward. The numbers are
those of the operations up to the order of sums.

Gradients of the layer-norm: Ba et al., arXiv:1607.06450, section 3, written out as for batch-norms;
of the fake-quant: Esser et al., arXiv:1902.08153, eq. 1-3.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.functional.elements import Ends
from qat.functional.fused import Grid, is_worth_it, keep_values
from qat.functional.inductor import Kernel, bound
from qat.functional.kernels import GRID
from qat.functional.layout import Layout, find_rows


class _Kernels(NamedTuple):
    snap: Kernel
    gradients: Kernel


def _behind(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = normal if weight is None else normal * weight
    return y if bias is None else y + bias


def _snap(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Tensor, *grid: Tensor) -> Any:
    mean = x.mean(1, keepdim=True)
    inverse = torch.rsqrt((x - mean).square().mean(1, keepdim=True) + eps)
    values, codes = Ends(*grid).snap(_behind((x - mean) * inverse, weight, bias))
    return values, codes, mean, inverse


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    *grid: Tensor,
) -> Any:
    """Return the gradients of ``x``, weight, bias and scale."""
    normal = (x - mean) * inverse
    moved, parts = Ends(*grid).terms(grad, _behind(normal, weight, bias))
    passed = moved if weight is None else moved * weight
    along = (passed * normal).mean(1, keepdim=True)
    grad_x = inverse * (passed - passed.mean(1, keepdim=True) - normal * along)
    return grad_x, (moved * normal).sum(0), moved.sum(0), parts.sum(1).sum()


@functools.cache
def _kernels(device_type: str) -> _Kernels:
    rows, affine = "rb", ("1b", "1b")
    return _Kernels(
        Kernel(device_type, _snap, (rows, *affine, "", *GRID)),
        Kernel(device_type, _gradients, (rows, rows, *affine, "r1", "r1", *GRID)),
    )


class _How(NamedTuple):
    eps: float
    grid: Grid
    layout: Layout


class _NormedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: _How, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor
    ) -> Tensor:
        del scale  # it is in ``how``, and stands here for its gradient
        ends, made = how.grid.ends(), _kernels(x.device.type)
        affine = [None if values is None else values.view(1, -1) for values in (weight, bias)]
        rows, eps = how.layout.split(x), bound(how.eps, x.device)
        values, codes, *moments = made.snap(rows, *affine, eps, *ends)
        ctx.save_for_backward(x, weight, bias)
        ctx.how, ctx.ends, ctx.moments = how, ends, moments
        return keep_values(values, codes.view(-1), how.grid, ends, how.layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        how, made = ctx.how, _kernels(x.device.type)
        affine = [None if values is None else values.view(1, -1) for values in (weight, bias)]
        rows = how.layout.split(grads[0]), how.layout.split(x)
        found, *of_affine, of_scale = made.gradients(*rows, *affine, *ctx.moments, *ctx.ends)
        shaped = [
            None if values is None else grad.view(values.shape)
            for values, grad in zip((weight, bias), of_affine, strict=True)
        ]
        of_scale = of_scale.view(how.grid.scale.shape).mul_(how.grid.factor)
        return None, how.layout.join(found), *shaped, of_scale


def fused_layer_norm(x: Tensor, norm: nn.LayerNorm, grid: Grid) -> Tensor | None:
    """Return ``fake_quantize(norm(x))`` in one pass each way, or ``None`` if that is not possible.

    Args:
        x: Real values ``(..., *norm.normalized_shape)``; only float32 and contiguous.
        norm: The layer-norm.
        grid: What follows; with one scale, and at most 256 codes.
    """
    if not is_worth_it(x) or x.dtype != torch.float32 or not x.is_contiguous():
        return None
    leading = x.shape[: x.ndim - len(norm.normalized_shape)]
    ones = [1] * len(norm.normalized_shape)
    layout = find_rows(x, torch.Size([*leading, *ones]))
    if layout is None or len(layout.seen) == 1 or 1 in layout.seen:
        return None
    return _NormedRows.apply(_How(norm.eps, grid, layout), x, norm.weight, norm.bias, grid.receiver)
