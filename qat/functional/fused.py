"""Fake-quantization in one pass over memory each way: the arithmetic of ``affine``, compiled.

Written out in torch operations it reads and writes every element a dozen times. Here Inductor makes
one loop of each direction, which also adds up the gradients of scales, and nothing is kept for the
backward but the input; codes are made beside, for layers that keep the result. Values and their
gradients are those of ``fake_quantize`` bit for bit; the gradient of a scale is the same sum in
another order.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qat.functional.kept import keep
from qat.functional.layout import Rows, find_rows

LEAST = 2**10
"""Smaller tensors are not worth the call of a compiled function."""
MOST_GRAPHS = 64
"""Of one function: layouts, types, phases; torch keeps fewer by default, and then none is used."""
_ALL_IN_ONE_LOOP = dict.fromkeys(
    ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"), 1000
)
_ON_CUDA = {"eager_numerics.division_rounding": True}  # a division there is a product otherwise
log = logging.getLogger("qat")


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


class Kernels(NamedTuple):
    """Compiled functions, each for every size; scales and zero points broadcast against rows."""

    snap: Callable[..., Tensor]
    snap_and_code: Callable[..., tuple[Tensor, Tensor]]
    rebuild: Callable[..., Tensor]
    gradients_of_one: Callable[..., tuple[Tensor, Tensor]]
    gradients_of_rows: Callable[..., tuple[Tensor, Tensor]]


def _on_grid(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return whole steps from 0, between the ends."""
    return torch.minimum(torch.maximum((x / scale).round(), low), high)


def _snap(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (_on_grid(x.float(), scale, low, high) * scale).to(x.dtype)


def _snap_and_code(
    x: Tensor, other: Tensor | None, scale: Tensor, ends: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    low, high, floor, ceiling = ends
    value = x.float() if other is None else x.float() + other.float()
    value = torch.minimum(torch.maximum(value, floor), ceiling)
    whole = _on_grid(value, scale, low, high)
    return (whole * scale).to(x.dtype), as_bytes(whole - low)


def _rebuild(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return (codes.float() + low) * scale


def as_bytes(codes: Tensor) -> Tensor:
    """Return whole numbers from 0 to 255 as uint8; straight from float would not be vectorised."""
    return codes.to(torch.int32).to(torch.uint8)


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
    value = x.float() if other is None else x.float() + other.float()
    clamped = torch.minimum(torch.maximum(value, floor), ceiling)
    moved, parts = terms(grad.float(), clamped, scale, low, high)
    return (moved * ((value > floor) & (value < ceiling))).to(x.dtype), parts.sum()


def _gradients_of_rows(
    grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    moved, parts = terms(grad.float(), x.float(), scale, low, high)
    return moved.to(x.dtype), parts.sum(1, keepdim=True)


def compile_for(device_type: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` compiled for tensors of every size.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        function: Computes each element from a few others; what it uses twice is computed twice.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    options: Any = {**_ALL_IN_ONE_LOOP, **(_ON_CUDA if device_type == "cuda" else {})}
    return torch.compile(function, dynamic=True, options=options)


@functools.cache
def kernels(device_type: str) -> Kernels | None:
    """Return the compiled functions, warm, or ``None`` where nothing compiles here, and say so.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    functions = (_snap, _snap_and_code, _rebuild, _gradients_of_one, _gradients_of_rows)
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
    _, codes = made.snap_and_code(x, None, scale, tuple(ends))
    made.rebuild(codes, scale, ends[0])
    made.gradients_of_one(grad, x, None, scale, tuple(ends))
    x, grad = x.view(256, -1), grad.view(256, -1)
    rows = [torch.full((256, 1), value, device=device_type) for value in (1.0, 0.0, 1.0)]
    made.snap(x, *rows)
    made.gradients_of_rows(grad, x, *rows)


@functools.cache
def bound(code: float, device: torch.device) -> Tensor:
    """Return the end of a grid as the tensor that kernels take, so that no width is compiled in."""
    return torch.tensor(float(code), device=device)


class _FusedOne(torch.autograd.Function):
    """One scale; something may be added in front, and a clamp may follow it."""

    @staticmethod
    def forward(
        ctx: Any, how: tuple[Grid, Rows, Kernels], x: Tensor, other: Tensor | None, scale: Tensor
    ) -> Tensor:
        grid, rows, made = how
        spacing, ends, dtype = scale.detach().reshape(()), grid.ends(scale.device), x.dtype
        second = None if other is None else rows.split(other)
        values, codes = made.snap_and_code(rows.split(x), second, spacing, ends)
        y = rows.join(values)
        if grid.high - grid.low <= 255:
            y = keep(y, codes, lambda c: rows.join(made.rebuild(c, spacing, ends[0]).to(dtype)))
        ctx.save_for_backward(x, other, scale)
        ctx.how, ctx.ends = how, ends
        return y

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
    def forward(ctx: Any, how: tuple[Grid, Rows, Kernels], x: Tensor, scale: Tensor) -> Tensor:
        grid, rows, made = how
        ends = [end.reshape(-1, 1) for end in grid.ends(scale.device)[:2]]
        ctx.save_for_backward(x, scale)
        ctx.how, ctx.ends = how, ends
        return rows.join(made.snap(rows.split(x), scale.detach().reshape(-1, 1), *ends))

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
