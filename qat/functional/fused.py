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

from qat.functional.elements import Addend, Ends
from qat.functional.inductor import MOST_ELEMENTS, bound
from qat.functional.kept import Recipe, find_codes, keep
from qat.functional.kernels import Kernels, compiles, make_kernels
from qat.functional.layout import Layout, find_rows

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
        learned: What receives the gradient of ``scale``, if that is not ``scale`` itself.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    factor: float = 1.0
    clamp: tuple[float, float] = NO_CLAMP
    learned: Tensor | None = None

    @property
    def receiver(self) -> Tensor:
        """What receives the gradient of the scale, shape of ``scale``."""
        return self.scale if self.learned is None else self.learned

    @property
    def has_bytes(self) -> bool:
        """Whether a code fits into a byte."""
        return self.high - self.low <= 255

    def ends(self) -> Ends:
        """Return the grid, which has one scale, for kernels."""
        device = self.scale.device
        codes = (bound(code, device) for code in (self.low, self.high))
        clamp = (None if math.isinf(end) else bound(end, device) for end in self.clamp)
        return Ends(self.scale.detach().view(()), self.zero_point.detach().view(()), *codes, *clamp)

    def ends_of_rows(self) -> tuple[Tensor, ...]:
        """Return scales and zero points ``(R, 1)`` and both ends, for kernels of rows."""
        grids = (values.detach().reshape(-1, 1) for values in (self.scale, self.zero_point))
        return *grids, *(bound(code, self.scale.device) for code in (self.low, self.high))


class Front(NamedTuple):
    """What stands in front of a grid with one scale.

    Attributes:
        other: What is added first, of the same shape and dtype, if anything is.
        activation: The function behind the clamp; a name in ``SMOOTH``.
    """

    other: Tensor | None = None
    activation: str = ""


NOTHING = Front()


class _FusedOne(torch.autograd.Function):
    """One scale."""

    @staticmethod
    def forward(
        ctx: Any, how: tuple[Grid, Layout, Kernels], x: Tensor, other: Tensor | None, scale: Tensor
    ) -> Tensor:
        grid, layout, made = how
        ends, addend = grid.ends(), find_addend(other, layout)
        values, codes = made.snap_one(layout.split(x), *addend, *ends)
        save_with_addend(ctx, x, other, addend, scale)
        ctx.how, ctx.ends = how, ends
        return keep_values(values, codes, grid, ends, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grid, layout, made = ctx.how
        x, addend, scale = saved_with_addend(ctx, layout)
        inputs = layout.split(grads[0]), layout.split(x)
        found, of_scale = made.gradients_of_one(*inputs, addend, ctx.ends)
        grad_x, of_scale = layout.join(found), of_scale.view(scale.shape).mul_(grid.factor)
        return None, grad_x, None if addend.values is None else grad_x, of_scale


class _FusedRows(torch.autograd.Function):
    """A scale for each row."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Grid, Layout, Kernels], x: Tensor, scale: Tensor) -> Tensor:
        grid, layout, made = how
        rows, ends = layout.split(x), grid.ends_of_rows()
        ctx.save_for_backward(x, scale)
        ctx.how, ctx.ends = how, ends
        if x.is_leaf and x.requires_grad:  # a parameter: it stays, and values are made of it again
            recipe = Recipe(rows, lambda r: made.values_of_rows(r, *ends)[0], layout, x.dtype)
            return keep(layout.join(recipe.make(rows)), recipe)
        values, codes = made.snap_rows(rows, *ends)
        recipe = Recipe(codes, lambda c: made.rebuild_rows(c, *ends[:3])[0], layout, x.dtype)
        return keep(layout.join(values), recipe) if grid.has_bytes else layout.join(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, scale), (grid, layout, made) = ctx.saved_tensors, ctx.how
        inputs = layout.split(grads[0]), layout.split(x)
        grad_x, of_scale = made.gradients_of_rows(*inputs, *ctx.ends)
        return None, layout.join(grad_x), of_scale.view(scale.shape).mul_(grid.factor)


def find_addend(other: Tensor | None, layout: Layout) -> Addend:
    """Return what is added for kernels, as codes where those are known.

    Half floats were rounded once more behind their codes, which would be other values.
    """
    if other is None:
        return Addend()
    known = find_codes(other) if other.dtype == torch.float32 else None
    if known is None or known.recipe.grid is None:
        return Addend(layout.split(other))
    return Addend(layout.split(known.codes), *known.recipe.grid)


def save_with_addend(
    ctx: Any, x: Tensor, other: Tensor | None, addend: Addend, scale: Tensor
) -> None:
    """Keep tensors for the backward; what is added as codes where those are known."""
    coded = addend.scale is not None
    ctx.addend = addend if coded else None
    ctx.save_for_backward(x, None if coded else other, scale)


def saved_with_addend(ctx: Any, layout: Layout) -> tuple[Tensor, Addend, Tensor]:
    """Return what ``save_with_addend`` kept."""
    x, other, scale = ctx.saved_tensors
    given = Addend(None if other is None else layout.split(other))
    return x, given if ctx.addend is None else ctx.addend, scale


def keep_values(values: Tensor, codes: Tensor, grid: Grid, ends: Ends, layout: Layout) -> Tensor:
    """Return what one-scale kernels made, in the shape of ``layout``, to be kept as codes."""
    if not grid.has_bytes:
        return layout.join(values)
    made = make_kernels(values.device.type)
    first = ends[:3]
    recipe = Recipe(codes, lambda c: made.rebuild(c, *first)[0], layout, values.dtype, first)
    return keep(layout.join(values), recipe)


def is_worth_it(x: Tensor) -> bool:
    """Return whether fused kernels are wanted and there, and ``x`` has a size for them."""
    wanted = _Switch.on and not torch.is_inference_mode_enabled()
    return wanted and LEAST <= x.numel() <= MOST_ELEMENTS and compiles(x.device.type)


def fused_fake_quantize(x: Tensor, grid: Grid, front: Front = NOTHING) -> Tensor | None:
    """Return ``fake_quantize(activation(clamp(x + other)))`` in one pass, or ``None`` if it can't.

    Args:
        x: Real values, any float dtype.
        grid: What they are snapped to; with a clamp only if it has one scale.
        front: What is done first; only with one scale.
    """
    if not is_worth_it(x) or (x.dtype != torch.float32 and not grid.has_bytes):
        return None
    layout = find_rows(x, grid.scale.shape)
    if layout is None or 1 in layout.seen:
        return None
    how = grid, layout, make_kernels(x.device.type, front.activation)
    if len(layout.seen) == 1:
        return _FusedOne.apply(how, x, front.other, grid.receiver)
    return _FusedRows.apply(how, x, grid.receiver)


@contextlib.contextmanager
def fused_kernels() -> Iterator[None]:
    """Inside, fake-quantization runs compiled; so do its backwards, wherever they run."""
    before, _Switch.on = _Switch.on, True
    try:
        yield
    finally:
        _Switch.on = before
