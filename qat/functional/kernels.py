"""The loops of fused fake-quantization: for one scale, and for rows that have one each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.elements import NUM_ADDEND, SMOOTH, Addend, Ends, passed, rebuild, snap, terms
from qat.functional.inductor import Kernel


class Sums:
    """The gradients of a grid with one scale, whose sum is split into rows where sizes allow it.

    On CPUs one loop over all elements would carry each sum through memory, and wait for it.
    """

    def __init__(self, device_type: str, activation: str) -> None:
        gradients, rest = functools.partial(_gradients_of_one, activation), GRID_OF_ADDEND + GRID
        self._flat = Kernel(device_type, gradients, ("", "n", "n", "n", *rest))
        self._rows = Kernel(device_type, gradients, ("r1", "rb", "rb", "rb", *rest))

    @property
    def failure(self) -> str:
        """Why a loop could not be compiled; empty if all could."""
        return self._flat.failure or self._rows.failure

    def __call__(self, grad: Tensor, x: Tensor, addend: Addend, ends: Ends) -> Sequence[Tensor]:
        """Return the gradients of ``x``, of its shape, and of the scale."""
        ones = ones_of_rows(x.numel()) if x.device.type == "cpu" else None
        if ones is None:
            return self._flat(None, grad, x, *addend, *ends)
        shape = ones.shape[0], -1
        values = None if addend.values is None else addend.values.view(shape)
        rows = grad.view(shape), x.view(shape), values
        found, of_scale = self._rows(ones, *rows, *addend[1:], *ends)
        return found.view(-1), of_scale


class Kernels(NamedTuple):
    """Compiled functions, each for every size; scales and zero points broadcast against rows."""

    snap_one: Kernel
    snap_rows: Kernel
    values_of_rows: Kernel
    rebuild: Kernel
    rebuild_rows: Kernel
    gradients_of_one: Sums
    gradients_of_rows: Kernel


def _snap_one(activation: str, x: Tensor, *given: Tensor) -> Any:
    addend, ends = Addend(*given[:NUM_ADDEND]), Ends(*given[NUM_ADDEND:])
    values, codes = ends.snap(SMOOTH[activation].values(ends.clamp(addend.add_to(x))))
    return values.to(x.dtype), codes


def _gradients_of_one(
    activation: str, ones: Tensor | None, grad: Tensor, x: Tensor, *given: Tensor
) -> Any:
    """With ``ones``, a sum of rows; that factor keeps Inductor from a second loop."""
    addend, ends = Addend(*given[:NUM_ADDEND]), Ends(*given[NUM_ADDEND:])
    ends = ends if ones is None else ends._replace(scale=ends.scale * ones)
    moved, parts = passed(activation, grad, addend.add_to(x), ends)
    return moved.to(x.dtype), parts.sum() if ones is None else parts.sum(1).sum()


LONGEST_ROW = 2**16
"""That is summed up without steps between: 4,096 values in each of 16 lanes."""


@functools.cache
def ones_of_rows(elements: int) -> Tensor | None:
    """Return 1 for each of the rows ``(R, 1)`` into which a sum falls; ``None`` if it does not."""
    twos = elements & -elements
    rows = 2
    while elements > rows * LONGEST_ROW:
        rows *= 2
    return torch.ones(rows, 1) if rows < elements and rows <= twos else None


def _snap_rows(x: Tensor, *grid: Tensor) -> Any:
    values, codes = snap(x.float(), *grid)
    return values.to(x.dtype), codes


def _values_of_rows(x: Tensor, *grid: Tensor) -> Any:
    return (_snap_rows(x, *grid)[0],)


def _gradients_of_rows(grad: Tensor, x: Tensor, *grid: Tensor) -> Any:
    moved, parts = terms(grad.float(), x.float(), *grid)
    return moved.to(x.dtype), parts.sum(1, keepdim=True)


def _values_of_codes(codes: Tensor, *grid: Tensor) -> Any:
    return (rebuild(codes, *grid),)


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
    snap = functools.partial(_snap_one, activation)
    return Kernels(
        Kernel(device_type, snap, ("n", "n", *GRID_OF_ADDEND, *GRID)),
        Kernel(device_type, _snap_rows, ("rb", *ROWS)),
        Kernel(device_type, _values_of_rows, ("rb", *ROWS)),
        Kernel(device_type, _values_of_codes, ("n", "", "", "")),
        Kernel(device_type, _values_of_codes, ("rb", *ROWS[:3])),
        Sums(device_type, activation),
        Kernel(device_type, _gradients_of_rows, ("rb", "rb", *ROWS)),
    )


@functools.cache
def compiles(device_type: str) -> bool:
    """Return whether kernels can be compiled for a device, and say so where they cannot."""
    x, grad = (torch.zeros(1024, device=device_type) for _ in range(2))
    one = torch.ones((), device=device_type)
    ends = Ends(one, one, one, one, None, None)
    made = make_kernels(device_type)
    made.snap_one(x, *Addend(), *ends)
    made.gradients_of_one(grad, x, Addend(), ends)
    return not (made.snap_one.failure or made.gradients_of_one.failure)
