"""Fake-quantization in one pass over memory each way: the arithmetic of ``affine``, compiled.

Written out in torch operations it reads and writes every element a dozen times. Here Inductor makes
one loop of each direction, which also adds up the gradients of scales, and nothing is kept for the
backward but the input; codes are made beside, for layers that keep the result. Values and their
gradients are those of ``fake_quantize`` bit for bit; the gradient of a scale is the same sum in
another order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qat.functional.inductor import bound
from qat.functional.kept import keep
from qat.functional.kernels import Kernels, kernels, rebuild_codes
from qat.functional.layout import Rows, find_rows

LEAST = 2**10
"""Smaller tensors are not worth the call of a compiled function."""


class _Switch:
    on: ClassVar[bool] = False


NO_CLAMP = (-math.inf, math.inf)


class Grid(NamedTuple):
    """A grid, and the clamp of an activation function in front of it.

    Attributes:
        scale: Grid spacing in real units, positive; a shape that ``expand`` takes.
        zero_point: Code of the real value 0; shape of ``scale``.
        low: Lowest code.
        high: Highest code.
        factor: Multiplies the gradient of ``scale``.
        clamp: The least and the greatest value; beyond and at them there is no gradient.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    factor: float = 1.0
    clamp: tuple[float, float] = NO_CLAMP

    def ends(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the ends in steps from 0, shape of ``scale``, and those of the clamp."""
        offset = self.zero_point.detach()
        low, high = (bound(code, device) - offset for code in (self.low, self.high))
        return low, high, *(bound(value, device) for value in self.clamp)


How = tuple[Grid, Rows, Kernels]


def _coded(values: Tensor, codes: Tensor, spacing: Tensor, low: Tensor, how: How) -> Tensor:
    """Return ``values`` as a tensor that backwards may keep as ``codes``."""
    (grid, rows, _), dtype = how, values.dtype
    if grid.high - grid.low > 255:
        return rows.join(values)
    return keep(
        rows.join(values), codes, lambda c: rows.join(rebuild_codes(c, spacing, low).to(dtype))
    )


class _FusedOne(torch.autograd.Function):
    """One scale; something may be added in front, and a clamp may follow it."""

    @staticmethod
    def forward(ctx: Any, how: How, x: Tensor, other: Tensor | None, scale: Tensor) -> Tensor:
        grid, rows, made = how
        spacing, ends = scale.detach().reshape(()), grid.ends(scale.device)
        second = None if other is None else rows.split(other)
        values, codes = made.snap_one(rows.split(x), second, spacing, ends)
        ctx.save_for_backward(x, other, scale)
        ctx.how, ctx.ends = how, ends
        return _coded(values, codes, spacing, ends[0], how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, other, scale), (grid, rows, made) = ctx.saved_tensors, ctx.how
        second = None if other is None else rows.split(other)
        found, grad_scale = made.gradients_of_one(
            rows.split(grads[0]), rows.split(x), second, scale.detach().reshape(()), ctx.ends
        )
        grad_x = rows.join(found)
        grad_scale = grad_scale.view(scale.shape).mul_(grid.factor)
        return None, grad_x, None if other is None else grad_x, grad_scale


class _FusedRows(torch.autograd.Function):
    """A scale for each row."""

    @staticmethod
    def forward(ctx: Any, how: How, x: Tensor, scale: Tensor) -> Tensor:
        grid, rows, made = how
        ends = [end.reshape(-1, 1) for end in grid.ends(scale.device)[:2]]
        ctx.save_for_backward(x, scale)
        ctx.how, ctx.ends = how, ends
        spacing = scale.detach().reshape(-1, 1)
        values, codes = made.snap_rows(rows.split(x), spacing, *ends)
        return _coded(values, codes, spacing, ends[0], how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, scale), (grid, rows, made) = ctx.saved_tensors, ctx.how
        spacing = scale.detach().reshape(-1, 1)
        grad_x, grad_scale = made.gradients_of_rows(
            rows.split(grads[0]), rows.split(x), spacing, *ctx.ends
        )
        return None, rows.join(grad_x), grad_scale.view(scale.shape).mul_(grid.factor)


def is_worth_it(x: Tensor) -> bool:
    """Return whether fused kernels are wanted and there, and ``x`` is large enough for them."""
    wanted = _Switch.on and x.numel() >= LEAST and not torch.is_inference_mode_enabled()
    return wanted and kernels(x.device.type) is not None


def fused_fake_quantize(x: Tensor, grid: Grid, other: Tensor | None = None) -> Tensor | None:
    """Return ``fake_quantize(clamp(x + other))`` in one pass, or ``None`` if that is not possible.

    Args:
        x: Real values, any float dtype.
        grid: What they are snapped to; with a clamp only if it has one scale.
        other: What is added first, of the same shape and dtype; only with one scale.
    """
    if not is_worth_it(x):
        return None
    half = x.dtype != torch.float32 and grid.high - grid.low > 255
    rows = None if half else find_rows(x, grid.scale.shape)
    made = kernels(x.device.type)
    if rows is None or 1 in rows.shape or made is None:
        return None
    if len(rows.shape) == 1:
        return _FusedOne.apply((grid, rows, made), x, other, grid.scale)
    return _FusedRows.apply((grid, rows, made), x, grid.scale)


@contextlib.contextmanager
def fused_kernels() -> Iterator[None]:
    """Inside, fake-quantization runs compiled; so do its backwards, wherever they run."""
    before, _Switch.on = _Switch.on, True
    try:
        yield
    finally:
        _Switch.on = before
