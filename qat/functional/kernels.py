"""The loops of fused fake-quantization: for one scale, and for rows that have one each."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.functional.inductor import Kernel, as_bytes

log = logging.getLogger("qat")


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


class Kernels(NamedTuple):
    """Compiled functions, each for every size; scales and zero points broadcast against rows."""

    snap_one: Kernel
    snap_rows: Kernel
    values_of_rows: Kernel
    rebuild: Kernel
    rebuild_rows: Kernel
    gradients_of_one: Kernel
    gradients_of_rows: Kernel


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
        return _snap(x, self.scale, self.zero, self.low, self.high)

    def terms(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of ``x``, and what each element adds to that of the scale.

        Args:
            grad: Of the values on the grid, float32.
            x: In front of the grid, float32.
        """
        return _terms(grad, x, self.scale, self.zero, self.low, self.high)

    def passed(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient in front of the clamp, 0 beyond and at its ends."""
        grad = grad if self.floor is None else grad * (x > self.floor)
        return grad if self.ceiling is None else grad * (x < self.ceiling)


def _snap(
    x: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    low, high = low - zero, high - zero
    steps = torch.minimum(torch.maximum((x / scale).round(), low), high)
    return steps * scale, as_bytes(steps - low)


def _terms(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    low, high, steps = low - zero, high - zero, x / scale
    inside, whole = (steps >= low) & (steps <= high), steps.round()
    clipped = torch.minimum(torch.maximum(whole, low), high)
    return grad * inside, grad * torch.where(inside, whole - steps, clipped)


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
        return x.float() + _rebuild(self.values, self.scale, self.zero, self.low)[0]


NUM_ADDEND = len(Addend._fields)


def _snap_one(activation: str, x: Tensor, *given: Tensor) -> Any:
    addend, ends = Addend(*given[:NUM_ADDEND]), Ends(*given[NUM_ADDEND:])
    values, codes = ends.snap(SMOOTH[activation].values(ends.clamp(addend.add_to(x))))
    return values.to(x.dtype), codes


def _gradients_of_one(activation: str, grad: Tensor, x: Tensor, *given: Tensor) -> Any:
    addend, ends = Addend(*given[:NUM_ADDEND]), Ends(*given[NUM_ADDEND:])
    moved, parts = passed(activation, grad, addend.add_to(x), ends)
    return moved.to(x.dtype), parts.sum()


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


def _snap_rows(x: Tensor, *grid: Tensor) -> Any:
    values, codes = _snap(x.float(), *grid)
    return values.to(x.dtype), codes


def _values_of_rows(x: Tensor, *grid: Tensor) -> Any:
    return (_snap_rows(x, *grid)[0],)


def _gradients_of_rows(grad: Tensor, x: Tensor, *grid: Tensor) -> Any:
    moved, parts = _terms(grad.float(), x.float(), *grid)
    return moved.to(x.dtype), parts.sum(1, keepdim=True)


def _rebuild(codes: Tensor, scale: Tensor, zero: Tensor, low: Tensor) -> Any:
    return ((codes.float() + (low - zero)) * scale,)


GRID = ("",) * len(Ends._fields)
GRID_OF_ADDEND = ("", "", "")
ROWS = ("r1", "r1", "", "")  # scale, zero point and ends


@functools.cache
def make_kernels(device_type: str, activation: str = "") -> Kernels:
    """Return the functions that are compiled when they first run.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        activation: What stands in front of a grid with one scale; a name in ``SMOOTH``.
    """
    snap, gradients = (
        functools.partial(function, activation) for function in (_snap_one, _gradients_of_one)
    )
    return Kernels(
        Kernel(device_type, snap, ("n", "n", *GRID_OF_ADDEND, *GRID)),
        Kernel(device_type, _snap_rows, ("rb", *ROWS)),
        Kernel(device_type, _values_of_rows, ("rb", *ROWS)),
        Kernel(device_type, _rebuild, ("n", "", "", "")),
        Kernel(device_type, _rebuild, ("rb", *ROWS[:3])),
        Kernel(device_type, gradients, ("n", "n", "n", *GRID_OF_ADDEND, *GRID)),
        Kernel(device_type, _gradients_of_rows, ("rb", "rb", *ROWS)),
    )


@functools.cache
def compiles(device_type: str) -> bool:
    """Return whether kernels can be compiled for a device, and say so where they cannot."""
    x, grad = (torch.zeros(1024, device=device_type) for _ in range(2))
    ends = [*(torch.ones((), device=device_type) for _ in GRID[:4]), None, None]
    try:
        made = make_kernels(device_type)
        made.snap_one(x, *Addend(), *ends)
        made.gradients_of_one(grad, x, *Addend(), *ends)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        log.warning("fake-quantization runs uncompiled and slower: %s", reason)
        return False
    return True
