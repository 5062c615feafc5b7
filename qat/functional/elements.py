"""What fused loops do to each element: clamps, activation functions, grids and their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.functional.inductor import as_bytes


class Smooth(NamedTuple):
    """An activation function.

    Attributes:
        values: Of ``x``.
        gradient: Of ``x``, from that of the values and ``x``.
    """

    values: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


_aten: Any = torch.ops.aten
SMOOTH = {
    "": Smooth(lambda x: x, lambda grad, _: grad),
    "gelu": Smooth(F.gelu, _aten.gelu_backward),
    "gelu_tanh": Smooth(
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(_aten.gelu_backward, approximate="tanh"),
    ),
    "hardswish": Smooth(F.hardswish, _aten.hardswish_backward),
    "silu": Smooth(F.silu, _aten.silu_backward),
}
"""Activation functions that are no clamps, by the name of their kernels."""


class Ends(NamedTuple):
    """A grid with one scale behind a clamp; all of shape ``()``, codes as real values.

    Attributes:
        scale: Grid spacing, real units.
        zero: Code of the real value 0.
        low: Lowest code.
        high: Highest code.
        floor: Least value behind the clamp, if there is one.
        ceiling: Greatest value behind the clamp, if there is one.
    """

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    floor: Tensor | None
    ceiling: Tensor | None

    def clamp(self, x: Tensor) -> Tensor:
        """Return ``x`` behind the clamp."""
        x = x if self.floor is None else torch.maximum(x, self.floor)
        return x if self.ceiling is None else torch.minimum(x, self.ceiling)

    def snap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return values on the grid, float32, and their codes, counted from the lowest, uint8."""
        return snap(x, self.scale, self.zero, self.low, self.high)

    def terms(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of ``x``, and what each element adds to that of the scale.

        Args:
            grad: Of the values on the grid, float32.
            x: In front of the grid, float32.
        """
        return terms(grad, x, self.scale, self.zero, self.low, self.high)

    def passed(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient in front of the clamp, 0 beyond and at its ends."""
        grad = grad if self.floor is None else grad * (x > self.floor)
        return grad if self.ceiling is None else grad * (x < self.ceiling)


def snap(
    x: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Return values on a grid, float32, and their codes, counted from the lowest, uint8."""
    low, span = low - zero, high - low
    codes = _count((x / scale).round(), low, span)
    return (codes + low) * scale, as_bytes(codes)


def terms(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``x``, and each element's for the scale; both float32."""
    low, high, steps = low - zero, high - zero, x / scale
    inside, whole = (steps >= low) & (steps <= high), steps.round()
    clipped = _count(whole, low, high - low) + low
    return grad * inside, grad * torch.where(inside, whole - steps, clipped)


def _count(whole: Tensor, low: Tensor, span: Tensor) -> Tensor:
    """Return whole numbers, clamped, as they count from ``low`` to ``low + span``.

    These differences are exact, and NaN stays NaN: a ReLU hands it on in one instruction on CPUs,
    where minimum and maximum take four.
    """
    return span - torch.relu(span - torch.relu(whole - low))


class Addend(NamedTuple):
    """What is added in front of a clamp, if anything is.

    Attributes:
        values: Real ones, or codes on a grid, uint8, counted from the lowest.
        scale: Of codes; shape ``()``, as the next two.
        zero: Of codes, their zero point.
        low: Of codes, the lowest.
    """

    values: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    low: Tensor | None = None

    def add_to(self, x: Tensor) -> Tensor:
        """Return the sum, float32."""
        if self.values is None:
            return x.float()
        if self.scale is None or self.zero is None or self.low is None:
            return x.float() + self.values.float()
        return x.float() + rebuild(self.values, self.scale, self.zero, self.low)


NUM_ADDEND = len(Addend._fields)


def passed(activation: str, grad: Tensor, x: Tensor, ends: Ends) -> tuple[Tensor, Tensor]:
    """Return the gradient in front of clamp and activation, and each element's for the scale.

    Args:
        activation: A name in ``SMOOTH``.
        grad: Of the values on the grid.
        x: In front of the clamp, float32.
        ends: The clamp and the grid.
    """
    clamped, smooth = ends.clamp(x), SMOOTH[activation]
    moved, parts = ends.terms(grad.float(), smooth.values(clamped))
    return ends.passed(smooth.gradient(moved, clamped), x), parts


def rebuild(codes: Tensor, scale: Tensor, zero: Tensor, low: Tensor) -> Tensor:
    """Return the real values of codes that are counted from the lowest."""
    return (codes.float() + (low - zero)) * scale
