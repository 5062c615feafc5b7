"""Fake-quantization in one pass over memory each way: the arithmetic of ``affine``, compiled.

Written out in torch operations it reads and writes every element a dozen times. Here Inductor makes
one loop of each direction, which also adds up the gradients of scales, and nothing is kept for the
backward but the input. Values and their gradients are those of ``fake_quantize`` bit for bit; the
gradient of a scale is the same sum in another order.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qat.functional.layout import Rows, find_rows

LEAST = 2**14
"""Smaller tensors are not worth the call of a compiled function."""
_ON_CUDA = {"eager_numerics.division_rounding": True}  # a division there is a product otherwise
log = logging.getLogger("qat")


class _Switch:
    on: ClassVar[bool] = False


class Kernels(NamedTuple):
    """Compiled functions, each for every size; scales and zero points broadcast against rows."""

    snap: Callable[..., Tensor]
    gradients_of_one: Callable[..., tuple[Tensor, Tensor]]
    gradients_of_rows: Callable[..., tuple[Tensor, Tensor]]


def _snap(x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    codes = (x.float() / scale).round() + zero_point
    codes = torch.minimum(torch.maximum(codes, low), high)
    return ((codes - zero_point) * scale).to(x.dtype)


def _terms(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``x``, and what each element adds to that of its scale."""
    grad, steps = grad.float(), x.float() / scale
    low, high = low - zero_point, high - zero_point
    inside, whole = (steps >= low) & (steps <= high), steps.round()
    clipped = torch.minimum(torch.maximum(whole, low), high)
    return (grad * inside).to(x.dtype), grad * torch.where(inside, whole - steps, clipped)


def _gradients_of_one(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, terms = _terms(*arguments)
    return grad_x, terms.sum()


def _gradients_of_rows(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, terms = _terms(*arguments)
    return grad_x, terms.sum(1, keepdim=True)


@functools.cache
def kernels(device_type: str) -> Kernels | None:
    """Return the compiled functions, warm, or ``None`` where nothing compiles here, and say so.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    options: Any = _ON_CUDA if device_type == "cuda" else None
    compiled: Any = functools.partial(torch.compile, dynamic=True, options=options)
    try:
        made = Kernels(*map(compiled, (_snap, _gradients_of_one, _gradients_of_rows)))
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
    ends = [bound(code, torch.device(device_type)) for code in (0, 1)]
    pairs = ((2**20,), made.gradients_of_one), ((256, 2**12), made.gradients_of_rows)
    for shape, gradients in pairs:
        x, grad = (torch.zeros(shape, device=device_type) for _ in range(2))
        parameters = () if x.ndim == 1 else (shape[0], 1)
        scale, zero_point = (torch.ones(parameters, device=device_type) for _ in range(2))
        made.snap(x, scale, zero_point, *ends)
        gradients(grad, x, scale, zero_point, *ends)


@functools.cache
def bound(code: int, device: torch.device) -> Tensor:
    """Return the end of a grid as the tensor that kernels take, so that no width is compiled in."""
    return torch.tensor(float(code), device=device)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        grid: tuple[int, int, float],
        rows: Rows,
        made: Kernels,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid, ctx.rows, ctx.made = grid, rows, made
        return rows.join(made.snap(rows.split(x), *_parameters(scale, zero_point, grid, rows)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        rows: Rows = ctx.rows
        made = ctx.made.gradients_of_one if len(rows.shape) == 1 else ctx.made.gradients_of_rows
        parameters = _parameters(scale, zero_point, ctx.grid, rows)
        grad_x, grad_scale = made(rows.split(grads[0]), rows.split(x), *parameters)
        grad_scale = grad_scale.view(scale.shape).mul_(ctx.grid[2])
        return rows.join(grad_x), grad_scale, None, None, None, None


def _parameters(
    scale: Tensor, zero_point: Tensor, grid: tuple[int, int, float], rows: Rows
) -> tuple[Tensor, ...]:
    shape = () if len(rows.shape) == 1 else (-1, 1)
    ends = (bound(code, scale.device) for code in grid[:2])
    return scale.detach().reshape(shape), zero_point.detach().reshape(shape), *ends


def fused_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: tuple[int, int, float]
) -> Tensor | None:
    """Return what ``fake_quantize`` does, in one pass, or ``None`` where that is not possible.

    Args:
        x: Real values, any float dtype.
        scale: Grid spacing in the units of ``x``, positive; a shape that ``expand`` takes.
        zero_point: Code of the real value 0; shape of ``scale``.
        grid: Lowest code, highest code, and what multiplies the gradient of ``scale``.
    """
    if not _Switch.on or x.numel() < LEAST or torch.is_inference_mode_enabled():
        return None
    half = x.dtype != torch.float32 and grid[1] - grid[0] > 255
    rows = None if half else find_rows(x, scale.shape)
    if rows is None or 1 in rows.shape or (made := kernels(x.device.type)) is None:
        return None
    return _Fused.apply(x, scale, zero_point, grid, rows, made)


@contextlib.contextmanager
def fused_kernels() -> Iterator[None]:
    """Inside, fake-quantization runs compiled; so do its backwards, wherever they run."""
    before, _Switch.on = _Switch.on, True
    try:
        yield
    finally:
        _Switch.on = before
