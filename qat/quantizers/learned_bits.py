"""Learned bit-width: step and range are both learned, and the bits follow.

Source: Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization", ICLR 2020,
arXiv:1905.11452: the parametrization U3 of uniform quantization, by step size and range.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.functional.affine import dequantize, expand, reduce_to
from qat.functional.ste import replace_value
from qat.quantizers.scales import LearnedScale
from qat.spec import QuantSpec

MIN_BITS = 2


class _StepAndRange(torch.autograd.Function):
    """The grid ``bottom .. top`` and the gradients of U3 for value, step and range."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, limit: Tensor, top: Tensor, signed: bool
    ) -> Tensor:
        del limit
        ctx.save_for_backward(x, scale, top)
        ctx.signed = signed
        codes = held_codes(x, scale, top, signed)
        return dequantize(codes, scale, torch.zeros_like(scale), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, top = ctx.saved_tensors
        grad, highest = grads[0].float(), expand(top, x.shape)
        steps = x.float() / expand(scale, x.shape)
        over, under = steps > highest, steps < (-highest if ctx.signed else 0)
        inside = ~(over | under)
        of_limit = over.float() - under.float() if ctx.signed else over.float()
        return (
            (grad * inside).to(x.dtype),
            reduce_to(grad * (steps.round() - steps) * inside, scale.shape),
            reduce_to(grad * of_limit, scale.shape),
            None,
            None,
        )


def held_codes(x: Tensor, scale: Tensor, top: Tensor, signed: bool) -> Tensor:
    """Return the integer codes of ``x`` on a grid that ends at ``top``, float32, shape of ``x``.

    Args:
        x: Real values. Shape ``(...)``.
        scale: Grid spacing, real units; a shape that ``expand`` takes.
        top: Highest code, shape of ``scale``; the lowest is its negative, or 0 if not ``signed``.
        signed: Whether there are negative codes.
    """
    steps, highest = x.float() / expand(scale, x.shape), expand(top, x.shape)
    return steps.round_().clamp_(-highest if signed else torch.zeros_like(highest), highest)


class LearnedBits(LearnedScale):
    """Fake-quantize with a learned step ``d`` and range ``q_max``; ``spec.bits`` is the most.

    The bits are ``ceil(log2(q_max / d + 1))``, and one more for the sign. A penalty on them makes
    them fewer (``SizePenalty``); without one, only accuracy moves them.

    Args:
        spec: The number format, symmetric, of 2 bits or more; codes are symmetric and fit it.
        scale_shape: Shape of the scale; every entry has a step, a range and bits of its own.
        has_batch: Whether axis 0 of what it sees counts samples.

    Paper:
        Forward and gradients are those of U3: inside, ``(Q(x) - x) / d`` for ``d`` and 1 for
        ``x``; where clipped, ``sign(x)`` for ``q_max``. Differs: ``q_max`` is rounded to a whole
        number of steps, so that codes are integers, and held where the bits lie between 2 and
        ``spec.bits``: there it is a multiple of ``d``, which gets its gradient, too. The step is a
        power of two only in formats that ask for it; each channel may have its own.
    """

    needs = "symmetric formats of 2 bits or more"

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        self.learned_limit = nn.Parameter(torch.full(scale_shape, float(spec.qmax)))

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        del has_batch
        return spec.symmetric and spec.bits >= MIN_BITS

    @classmethod
    def code_format(cls, spec: QuantSpec) -> QuantSpec:
        """Return the format of the codes: without the lowest signed one."""
        return replace(spec, narrow=spec.signed)

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Copy positive ``scale`` values in, in place, with the range of all ``spec.bits``."""
        self.learned_scale.copy_(scale)
        self.learned_limit.copy_(scale * self.spec.qmax)

    @property
    def steps(self) -> Tensor:
        """The range in steps, held between those of 2 bits and of ``spec.bits``; differentiable.

        Gradient 0 below, where bits cannot become fewer; 1 above, so that it comes back.
        """
        least, most = self._ends
        steps = self.learned_limit / self.scale
        steps = torch.where(steps < least, least, steps)
        return replace_value(steps.detach().clamp_max(most), steps)

    @property
    def bits_in_use(self) -> Tensor:
        """Bits that the codes of now need, shape of the scale; the gradient skips the ceiling."""
        smooth = (self.steps + 1).log2() + self.spec.signed
        lengths = torch.frexp(self._top).exponent  # ceil(log2(top + 1)), without its rounding
        return replace_value(lengths.float() + self.spec.signed, smooth)

    @property
    def _ends(self) -> tuple[int, int]:
        return replace(self.spec, bits=MIN_BITS, narrow=False).qmax, self.spec.qmax

    @property
    def _top(self) -> Tensor:
        return self.steps.detach().round()

    def _limit(self) -> Tensor:
        """Return the range that is kept; where it is held, the step moves it, too."""
        scale, (least, most) = self.scale, self._ends
        steps = self.learned_limit.detach() / scale.detach()
        below_most = torch.where(steps > most, scale * most, self.learned_limit)
        back = self.learned_limit - self.learned_limit.detach()  # 0, with a way back up
        return torch.where(steps < least, scale * least + back, below_most)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of real values ``x`` as float32, shape of ``x``."""
        return held_codes(x, self.scale, self._top, self.spec.signed)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``, float32 over 8 bits."""
        values = x.float() if self.spec.bits > 8 else x
        return _StepAndRange.apply(values, self.scale, self._limit(), self._top, self.spec.signed)
