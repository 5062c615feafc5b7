"""LSQ+: scale and offset are parameters, for activations that reach a little below zero.

Source: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better
initialization", CVPR Workshops 2020, arXiv:2004.09576, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.functional.affine import dequantize, expand, quantize, reduce_to, scale_from_range
from qat.quantizers.lsq import LSQ
from qat.spec import QuantSpec


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor,
        zero_point: Tensor,
        ends: tuple[int, int],
        factor: float,
    ) -> Tensor:
        del offset  # the zero point is made of it; only gradients go there
        ctx.save_for_backward(x, scale, zero_point)
        ctx.ends, ctx.factor = ends, factor
        dtype = torch.float32 if ends[1] - ends[0] > 255 else x.dtype
        return dequantize(quantize(x, scale, zero_point, *ends), scale, zero_point, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        qmin, qmax = ctx.ends
        grad, zero = grads[0].float(), expand(zero_point, x.shape)
        steps = x.float() / expand(scale, x.shape)
        inside = (steps >= qmin - zero) & (steps <= qmax - zero)
        nearest = steps.round()
        slope = torch.where(inside, nearest - steps, (nearest + zero).clamp(qmin, qmax))
        grad_scale = reduce_to(grad * slope, scale.shape) * ctx.factor
        grad_offset = reduce_to(grad * ~inside, scale.shape) * ctx.factor
        return (grad * inside).to(x.dtype), grad_scale, grad_offset, None, None, None


class LSQPlus(LSQ):
    """Fake-quantize with a learned scale and, in affine formats, a learned offset.

    With ``v = x / scale``, the gradient of each output with respect to ``scale`` is
    ``round(v) - v`` inside the grid and the code of the end where ``x`` was clipped; with respect
    to the offset it is 0 inside and 1 where clipped; both times LSQ's factor. In symmetric formats
    nothing is offset: this is LSQ.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale and of the offset.
        has_batch: Whether axis 0 of what it sees counts samples.

    Paper:
        Section 3; its ``beta`` is the offset. Differs: the offset is in use as the whole zero
        point ``round(-offset / scale)``, clamped to the grid, so that integers can be deployed and
        0 stays exact; ``round(v) - v`` is taken on that grid. The start is what the observer saw,
        and the offset's gradient has LSQ's factor, too.
    """

    learned_offset: nn.Parameter | None

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)

    def make_zero_point(self, scale_shape: tuple[int, ...]) -> None:
        """Create the offset, in real units, or leave it out of symmetric formats."""
        offset = None if self.spec.symmetric else nn.Parameter(torch.zeros(scale_shape))
        self.register_parameter("learned_offset", offset)

    @property
    @torch.no_grad()
    def zero_point(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The code of 0 in use, a whole number of the grid; shape of the scale, no gradient."""
        if self.learned_offset is None:
            return torch.zeros_like(self.learned_scale)
        steps = (-self.learned_offset / self.scale).round()
        return steps.clamp(self.spec.qmin, self.spec.qmax)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Copy in the scale and offset that cover ``low`` to ``high``, real units."""
        scale, zero_point = scale_from_range(low, high, self.spec)
        self.set_scale(scale)
        if self.learned_offset is not None:
            self.learned_offset.copy_(-zero_point * scale)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        offset, ends = self.learned_offset, (self.spec.qmin, self.spec.qmax)
        if offset is None:
            return super().forward(x)
        factor = self.gradient_factor(x)
        return _FakeQuantize.apply(x, self.scale, offset, self.zero_point, ends, factor)
