"""The loops of fused fake-quantization: for one scale, and for rows that have one each."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qat.functional.inductor import as_bytes, compile_for

log = logging.getLogger("qat")


class Kernels(NamedTuple):
    """Compiled functions, each for every size; scales and zero points broadcast against rows."""

    snap_one: Callable[..., tuple[Tensor, Tensor]]
    snap_rows: Callable[..., tuple[Tensor, Tensor]]
    rebuild: Callable[..., Tensor]
    gradients_of_one: Callable[..., tuple[Tensor, Tensor]]
    gradients_of_rows: Callable[..., tuple[Tensor, Tensor]]


def on_grid(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return whole steps from 0, between the ends."""
    return torch.minimum(torch.maximum((x / scale).round(), low), high)


def _clamped(x: Tensor, other: Tensor | None, ends: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return what lies in front of the clamp, and behind it."""
    value = x.float() if other is None else x.float() + other.float()
    return value, torch.minimum(torch.maximum(value, ends[2]), ends[3])


def _snap_one(
    x: Tensor, other: Tensor | None, scale: Tensor, ends: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    _, value = _clamped(x, other, ends)
    whole = on_grid(value, scale, *ends[:2])
    return (whole * scale).to(x.dtype), as_bytes(whole - ends[0])


def _snap_rows(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    whole = on_grid(x.float(), scale, low, high)
    return (whole * scale).to(x.dtype), as_bytes(whole - low)


def _rebuild(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return (codes.float() + low) * scale


def terms(
    grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``x``, and what each element adds to that of its scale.

    Args:
        grad: Of the values on the grid, float32.
        x: In front of the grid, float32.
        scale: Grid spacing.
        low: The lowest code, in steps from 0.
        high: The highest code, in steps from 0.
    """
    steps = x / scale
    inside, whole = (steps >= low) & (steps <= high), steps.round()
    clipped = torch.minimum(torch.maximum(whole, low), high)
    return grad * inside, grad * torch.where(inside, whole - steps, clipped)


def _gradients_of_one(
    grad: Tensor, x: Tensor, other: Tensor | None, scale: Tensor, ends: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    low, high, floor, ceiling = ends
    value, clamped = _clamped(x, other, ends)
    moved, parts = terms(grad.float(), clamped, scale, low, high)
    return (moved * ((value > floor) & (value < ceiling))).to(x.dtype), parts.sum()


def _gradients_of_rows(
    grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    moved, parts = terms(grad.float(), x.float(), scale, low, high)
    return moved.to(x.dtype), parts.sum(1, keepdim=True)


@functools.cache
def kernels(device_type: str) -> Kernels | None:
    """Return the compiled functions, warm, or ``None`` where nothing compiles here, and say so.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    functions = (_snap_one, _snap_rows, _rebuild, _gradients_of_one, _gradients_of_rows)
    try:
        made = Kernels(*(compile_for(device_type, f) for f in functions))
        _warm(made, device_type)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        log.warning("fake-quantization runs uncompiled and slower: %s", reason)
        return None
    return made


@torch.no_grad()
def _warm(made: Kernels, device_type: str) -> None:
    """Compile for large tensors: loops of functions that first see a small one stay serial.

    No argument stands twice: what is compiled would then hold only for such calls.
    """
    x, grad = (torch.zeros(2**20, device=device_type) for _ in range(2))
    scale, *ends = (
        torch.full((), value, device=device_type) for value in (1.0, 0.0, 1.0, 0.0, 9.0)
    )
    _, codes = made.snap_one(x, None, scale, tuple(ends))
    made.rebuild(codes, scale, ends[0])
    made.gradients_of_one(grad, x, None, scale, tuple(ends))
    x, grad = x.view(256, -1), grad.view(256, -1)
    rows = [torch.full((256, 1), value, device=device_type) for value in (1.0, 0.0, 1.0)]
    _, codes = made.snap_rows(x, *rows)
    made.rebuild(codes, *rows[:2])
    made.gradients_of_rows(grad, x, *rows)


def rebuild_codes(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Return the values that codes stand for, float32, of the same shape.

    Args:
        codes: uint8, counted from the lowest, ``(N,)`` or ``(R, B)``.
        scale: Grid spacing, shape ``()`` or ``(R, 1)``.
        low: The lowest code, in steps from 0, shape of ``scale``.
    """
    made = kernels(codes.device.type)
    assert made is not None
    return made.rebuild(codes, scale, low)
